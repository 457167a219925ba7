"""The flow against a real server, `transformers serve`, with models that were never taught to answer in JSON."""

import json
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

from dataset_builders.synflow.graph import borne_out
from dataset_builders.synflow.recipe import RenderedSource
from dataset_builders.synflow.rendered import draw_video


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
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
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
    answers = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "answers").glob("*/*/*.json")]
    captions = [answer for answer in answers if answer["requests"]]
    passed = [answer for answer in captions if "answer" in answer]
    films = [draw_video_film(number) for number in range(VIDEOS)]
    said = [answer.get("said") or " ".join(answer["answer"].values()) for answer in captions]
    # The best reading of each text: which film it is about, the store does not say.
    shares = [max((t / n for t, n in (borne_out(text, film) for film in films) if n), default=0.0) for text in said]
    record_property("share of answers that pass the schema", len(passed) / len(captions))
    record_property("share of statements borne out, at best", sum(shares) / len(shares))
    assert len(captions) >= VIDEOS
    if not passed:
        assert done.returncode == 1
        assert "error: no video got usable captions" in done.stderr
        assert "caption: answer_" in done.stderr and "requests" in done.stderr


def draw_video_film(number):
    return draw_video(RenderedSource(kind="rendered", id="films", videos=VIDEOS), SEED, number).film
