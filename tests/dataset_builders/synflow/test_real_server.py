"""The flow against a real server, `transformers serve`, with models that were never taught to answer in JSON."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from dataset_builders.synflow.captioning import caption_requests
from dataset_builders.synflow.documents import PartReader
from dataset_builders.synflow.engine import work_folder
from dataset_builders.synflow.graph import borne_out
from dataset_builders.synflow.recipe import load_recipe
from dataset_builders.synflow.sources import film_of
from dataset_builders.synflow.store import AnswerStore


BASE = Path(__file__).parents[3] / "training" / "gve-mini-base"
VIDEOS, SEED = 6, 5


def random_copy(folder):
    """A small vision-language model of the same shape that was never trained."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(BASE)).save_pretrained(folder)
    return folder


def wait_until_up(port, process):
    for _ in range(600):
        assert process.poll() is None, "transformers serve has stopped; it needs transformers[serving]"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError("transformers serve does not answer")


@pytest.mark.slow
@pytest.mark.parametrize("model, port", [("random", 8731), ("gve-mini-base", 8732)])
def test_answers_that_are_no_json_are_counted_and_said(tmp_path, model, port, record_property):
    pytest.importorskip("fastapi")
    folder = BASE if model == "gve-mini-base" else random_copy(tmp_path / "random")
    words = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", port, "--device", "cpu"]
    cache = tmp_path / "cache"  # it lists the models in there, and fails where there is none
    cache.mkdir()
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, env=environment)
    captioner = {
        "url": f"http://127.0.0.1:{port}/v1",
        "model": str(folder),
        "frames": 4,
        "side": 112,
        "max_tokens": 96,
        "retries": 0,
        "concurrency": 1,
        "timeout_seconds": 600,
    }
    recipe = {
        "name": "served",
        "seed": SEED,
        "sources": [{"kind": "rendered", "id": "films", "videos": VIDEOS}],
        "captioner": captioner,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "dataset_builders.synflow", tmp_path / "recipe.yaml"]
    command += ["--root", tmp_path / "runs", "--output", tmp_path / "data"]
    try:
        wait_until_up(port, server)
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=3000)
    finally:
        server.kill()
        server.wait()
    answers = answers_by_film(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "runs")
    passed = ["answer" in answer for _, answer in answers]
    own, others = borne_out_shares(answers)
    record_property("share of answers that pass the schema", sum(passed) / len(passed))
    record_property("share of statements that the film bears out", own)
    record_property("share that the other films bear out", others)
    assert len(answers) == VIDEOS
    if model == "random":
        assert not any(passed)
    if not any(passed):
        assert done.returncode == 1
        assert "error: no video got usable captions" in done.stderr
        assert "caption: answer_" in done.stderr and "requests" in done.stderr


def answers_by_film(recipe, runs):
    """`[(film, stored answer)]` to the request for each video's captions."""
    store, work = AnswerStore(runs / "answers"), work_folder(runs, recipe)
    documents = PartReader(work / "cut", every=True).run()
    requests = [(film_of(recipe, document), caption_requests(recipe, document)[0]) for document in documents]
    return [(film, store.get(request.key(recipe.captioner))) for film, request in requests]


def borne_out_shares(answers):
    """Of the words of the rendered world in all answers, how many are true of the film, and of the others on average:
    what a captioner that sees nothing would reach.
    """
    true = said = elsewhere = 0
    for film, answer in answers:
        text = answer.get("said") or " ".join(answer["answer"].values())
        others = [other for other, _ in answers if other is not film]
        true, said = true + borne_out(text, film)[0], said + borne_out(text, film)[1]
        elsewhere += sum(borne_out(text, other)[0] for other in others) / len(others)
    return true / max(1, said), elsewhere / max(1, said)
