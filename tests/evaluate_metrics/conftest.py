"""Fixtures of the runner's tests: the tiny benchmark and the stub model of `tiny_benchmark.py`."""

import pytest
from tiny_benchmark import write_benchmark, write_stub


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Datasets of these tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture
def stub_log(tmp_path, monkeypatch):
    """File with one line for each call of the stub's `encode`: rank, items, instruction."""
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "stub.log"))
    return tmp_path / "stub.log"


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    """All 16 datasets."""
    return write_benchmark(tmp_path_factory.mktemp("org") / "uvrb-tiny")


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """A model that is always right."""
    return write_stub(tmp_path_factory.mktemp("models") / "stub")
