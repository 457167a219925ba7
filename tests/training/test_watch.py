"""Early warnings: each told once, and only where there is trouble."""

import pytest

from training.curriculum import EpochPlan
from training.watch import Watch


@pytest.fixture
def told():
    return []


@pytest.fixture
def watch(told):
    return Watch(lambda kind, sentence: told.append((kind, sentence)), window_steps=3)


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        ([(0.99, 0.0, 1.0)] * 9, ["collapse"]),
        ([(0.99, 0.0, 1.0)] * 2, []),  # too short to tell
        ([(0.99, 0.0, 1.0), (0.99, 0.0, 1.0), (0.5, 0.0, 1.0)] * 3, []),
        ([(0.5, 0.4, 1.0)] * 4, ["loader"]),
        ([(0.5, 0.9, 1.0), (0.5, 0.0, 5.0), (0.5, 0.0, 5.0)], []),
    ],
)
def test_steps(watch, told, steps, kinds):
    for step in steps:
        watch.step(*step)
    assert [kind for kind, _ in told] == kinds


def test_a_task_that_will_hardly_be_drawn(watch, told):
    watch.epoch(EpochPlan(0, 0.1, {}, {"t2t": 0.995, "t2v": 0.005}), steps=100)
    watch.epoch(EpochPlan(1, 1.0, {}, {"t2t": 0.6, "t2v": 0.4}), steps=100)
    assert [kind for kind, _ in told] == ["never drawn in epoch 1"]
    assert "t2v" in told[0][1] and "t2t" not in told[0][1]
