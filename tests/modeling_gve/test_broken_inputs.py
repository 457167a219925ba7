"""Broken and odd inputs: no crash or hang, a named reason for each broken one, a right answer for each odd one."""

import os
import random
import signal
import threading

import av
import broken_inputs
import pytest


CASES = {case.name: case for case in broken_inputs.cases()}
SAMPLE = set(random.Random(0).sample(sorted(CASES), 20))


@pytest.fixture(scope="module")
def reader():
    av.logging.set_level(None)
    reader = broken_inputs.Reader()
    yield reader
    reader.close()


def params():
    slow = pytest.mark.slow
    return [pytest.param(case, id=name, marks=() if name in SAMPLE else slow) for name, case in CASES.items()]


@pytest.mark.parametrize("case", params())
def test_an_input_is_read_or_refused_with_its_reason(case, reader, tmp_path):
    case.make(tmp_path / case.name)
    assert broken_inputs.verdict(case, reader(case.kind, tmp_path / case.name)) is None


def test_the_seed_decides_the_bytes(tmp_path):
    for name in ("damaged_0_a.mp4", "false_noise_1000.mp4"):
        written = []
        for seed in (0, 0, 1):
            path = tmp_path / f"{len(written)}_{name}"
            next(case for case in broken_inputs.cases(seed) if case.name == name).make(path)
            written.append(path.read_bytes())
        assert written[0] == written[1] != written[2]


def test_a_crash_and_a_hang_are_results(reader, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    answer = reader("video", tmp_path / "a.mp4")
    assert "a.mp4: not a readable video" in answer["reason"]
    os.kill(reader._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(broken_inputs, "MAX_SECONDS", 0.5)
        assert reader("video", tmp_path / "a.mp4") == {"failure": "took more than 0.5 s"}
    assert reader("video", tmp_path / "a.mp4") == answer
    os.kill(reader._process.pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (reader._process.pid, signal.SIGKILL)).start()
    assert reader("video", tmp_path / "a.mp4") == {"failure": "crashed with code -9"}
