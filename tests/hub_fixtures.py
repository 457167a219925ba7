"""Fixtures around the stand-in Hub; a test module takes them with `pytest_plugins = ["hub_fixtures"]`.

The clients freeze their settings when they are imported, so they run in processes of their own, each with an
environment that points at the stand-in and with a fresh cache.
"""

import os
import subprocess
import sys

import pytest
from hub_stand_in import CLIENT_SETTINGS, TOKEN, HubStandIn


NOT_FOR_CLIENTS = ("PYTHONPATH", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A running stand-in Hub with empty storage, one for each test module."""
    with HubStandIn(tmp_path_factory.mktemp("hub")) as server:
        yield server


def client_env(hub, home, token=TOKEN):
    """Environment of a client process.

    Args:
        hub (`HubStandIn`): the Hub it talks to.
        home (`Path`): its `HF_HOME`; a fresh folder means an empty cache.
        token (`str`, *optional*): `None` leaves the client anonymous.

    Returns:
        `dict[str, str]`: this process's environment, less what would lead the client elsewhere.
    """
    env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_CLIENTS}
    env |= CLIENT_SETTINGS | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return env if token is None else env | {"HF_TOKEN": token}


@pytest.fixture
def run_client(hub, tmp_path):
    """`run_client(words, token=, cwd=, env=, code=0)`: runs Python with these words against the stand-in.

    Every call has a fresh `HF_HOME`; the finished process must have exited with `code`. `env` adds variables, for
    instance the `PYTHONPATH` of this checkout for a client that is part of the project.
    """
    homes = iter(range(1000))

    def run(words, token=TOKEN, cwd=tmp_path, env=None, code=0):
        environment = client_env(hub, tmp_path / f"home{next(homes)}", token) | (env or {})
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
