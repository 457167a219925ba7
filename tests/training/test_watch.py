"""Early warnings: each told once, and only where there is trouble; and the run that each of them is told of."""

import json
import shutil
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import steps_of, words_of

from training.checkpoint import checkpoints
from training.collate import PairCollator
from training.curriculum import EpochPlan
from training.losses import matryoshka_info_nce
from training.pyramid import main
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


def test_a_resumed_run_tells_nothing_twice(watch, told):
    resumed = Watch(lambda kind, sentence: told.append((kind, sentence)), ["collapse"], window_steps=3)
    for each in (watch, resumed):
        for _ in range(9):
            each.step(0.99, 0.0, 1.0)
    assert [kind for kind, _ in told] == ["collapse"] and watch.told == resumed.told


def test_a_task_that_will_hardly_be_drawn(watch, told):
    both = ["t2t", "t2v"] * 50
    watch.epoch(EpochPlan(0, 0.1, {}, {"t2t": 0.995, "t2v": 0.005}), both)
    watch.epoch(EpochPlan(1, 1.0, {}, {"t2t": 0.6, "t2v": 0.4}), both)
    watch.epoch(EpochPlan(2, 1.0, {}, {"t2t": 0.6, "t2v": 0.4}), ["t2t"] * 4)  # chance passes it over
    assert [kind for kind, _ in told] == ["never drawn in epoch 1", "never drawn in epoch 3"]
    assert all("t2v" in sentence and "t2t" not in sentence for _, sentence in told)


def collapse(base_model, folder):
    """A copy of the base that cannot tell one token from another."""
    shutil.copytree(base_model, folder)
    weights = load_file(folder / "model.safetensors")
    [name] = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name] = weights[name][:1].repeat(len(weights[name]), 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def slow_batch(self, *arguments, batch=PairCollator.batch):
    time.sleep(0.2)
    return batch(self, *arguments)


@pytest.mark.parametrize("kind", ["collapse", "loader", "never drawn in epoch 1"])
def test_a_run_tells_its_trouble(recipe, base_model, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("training.pyramid.Watch", partial(Watch, window_steps=2))
    words = ["--tasks", "t2t", "--task_hard_negatives", "t2t=0", "--epochs", "1", "--learning_rate", "1e-9"]
    if kind == "collapse":
        words += ["--model", str(collapse(base_model, tmp_path / "collapsed"))]
    elif kind == "loader":
        monkeypatch.setattr(PairCollator, "batch", slow_batch)
    else:
        words += ["--tasks", "t2t", "t2v", "i2v", "--steps_per_epoch", "1"]
    main(words_of(recipe, tmp_path / "out", *words))
    lines = map(json.loads, (tmp_path / "out/run/log.jsonl").read_text().splitlines())
    told = {line["warning"]: line["message"] for line in lines if "warning" in line}
    assert kind in told
    assert told[kind] in json.loads((tmp_path / "out/training_run.json").read_text())["warnings"]
    assert f"warning: {told[kind]}" in capsys.readouterr().out


class _NanGradient(torch.autograd.Function):
    """A number whose gradient is none, as that of a sum which overflows backwards."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize(
    ("what", "spoil"), [("loss", lambda loss: loss * float("nan")), ("gradient", _NanGradient.apply)]
)
def test_what_is_no_number_ends_the_run(recipe, tmp_path, monkeypatch, what, spoil):
    calls = iter(range(99))

    def loss(*arguments, **settings):
        output = matryoshka_info_nce(*arguments, **settings)
        return output._replace(loss=spoil(output.loss) if next(calls) == 3 else output.loss)

    monkeypatch.setattr("training.pyramid.matryoshka_info_nce", loss)
    with pytest.raises(ValueError, match=rf"the {what} of task \w+ is nan: lower learning_rate or raise temperature"):
        main(words_of(recipe, tmp_path))
    assert len(steps_of(tmp_path)) == 3
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["2"]  # from before the trouble
    assert not (tmp_path / "model.safetensors").exists()
