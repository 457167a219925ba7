"""Pretraining: what its batches hold, and that a killed run goes on to the same weights."""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from modeling_gve.layers_gve import batch_equal_windows
from training.base_model import build_config, build_processor
from training.grounding import GRID, N_SHOWN
from training.pretrain_base import Dialogues, GroundedCaptioner, PretrainingArguments, rendered_frames


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory, tokenizer):
    arguments = PretrainingArguments(films=24, batch_size=2, steps=20, cache_dir=str(tmp_path_factory.mktemp("films")))
    return Dialogues(arguments, build_processor(tokenizer), *rendered_frames(arguments))


def test_a_schedule_of_foundations_then_frame_pairs_then_captions(dialogues):
    first, middle, last = (dialogues.mixture(step) for step in (0, 10, 19))
    assert [sum(shares) for shares in (first, middle, last)] == pytest.approx([1, 1, 1])
    assert first[0] > 0.5  # single things at rest
    assert middle[-1] == 0.5  # frame pairs
    assert last[-1] == 0


def test_ranks_draw_the_same_kind_and_other_films(dialogues):
    pairs = [(dialogues.batch(step, 0), dialogues.batch(step, 1)) for step in range(12)]
    assert all(("input_ids" in one) == ("input_ids" in other) for one, other in pairs)  # frame pairs or dialogues
    ids = [(one["input_ids"], other["input_ids"]) for one, other in pairs if "input_ids" in one]
    assert not all(torch.equal(*both) for both in ids)


def test_frame_pairs_train_the_vision_tower_and_the_head_alone(dialogues, tokenizer):
    torch.manual_seed(0)
    model = GroundedCaptioner(Qwen2_5_VLForConditionalGeneration(build_config(tokenizer)), 0.3)
    batch_equal_windows(model.captioner.model.visual)
    rng = np.random.default_rng(0)
    batch = dialogues.frame_pairs(rng, 3)
    assert batch["shown"].shape == (3 * GRID**2, N_SHOWN)
    loss, captions, grounding = model(**batch)
    assert captions is None
    assert loss.item() == pytest.approx(0.3 * grounding.item())
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".visual." in name or name.startswith("head.")}


RUN = """
import os, signal, sys
from training import pretrain_base as pretraining
batch = pretraining.Dialogues.batch
def batch_or_die(self, step, rank):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, rank)
pretraining.Dialogues.batch = batch_or_die
pretraining.main(pretraining.PretrainingArguments(
    sys.argv[1], films=24, batch_size=2, steps=8, warmup_steps=2, save_steps=3, cache_dir=sys.argv[3]))
"""


@pytest.mark.slow
def test_a_killed_pretraining_goes_on_to_the_same_weights(tmp_path):
    def run(folder, fatal_step):
        command = [sys.executable, "-c", RUN, str(tmp_path / folder), str(fatal_step), str(tmp_path / "films")]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(command, capture_output=True, env=environment, timeout=300).returncode

    def digest(folder):
        return hashlib.sha256((tmp_path / folder / "model.safetensors").read_bytes()).hexdigest()

    assert run("whole", -1) == 0
    assert run("killed", 5) == -signal.SIGKILL
    assert (tmp_path / "killed.checkpoint.pt").exists()
    assert run("killed", -1) == 0
    assert digest("killed") == digest("whole")
