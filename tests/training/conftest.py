"""Fixtures of the training tests: a tiny pairs repo, one video of it broken, and a random model to start from."""

import socket

import pytest
import torch
import yaml
from tiny_pairs import noise_image, noise_video, row, side, write_pairs
from tiny_runs import STEPS
from transformers import Qwen2_5_VLForConditionalGeneration


COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="session")
def pairs_repo(tmp_path_factory):
    """Three tasks of 16 pairs; row 3 of t2v has a broken target, row 5 a broken negative."""
    videos = [noise_video(seed) for seed in range(18)]
    rows = {"t2t": [], "t2v": [], "i2v": []}
    for index in range(16):
        text, other = (
            f"clip {index}: {COLORS[index % 4]}",
            f"{COLORS[index % 4]} noise, number {index}, seen from above",
        )
        instruction, source = "Find the video.", f"film {index}"
        negatives = [side(video=videos[16 + slot]) for slot in range(index % 3)]
        video = videos[index]
        if index == 5:
            negatives = [side(video=b"garbage"), negatives[0]]
        if index == 3:
            video = video[:200]
        rows["t2t"].append(row(side(text), side(other), [], instruction, source, "t2t"))
        rows["t2v"].append(row(side(text), side(video=video), negatives, instruction, source, "t2v"))
        rows["i2v"].append(row(side(image=noise_image(index)), side(video=videos[index]), [], None, source, "i2v"))
    return write_pairs(tmp_path_factory.mktemp("pairs"), rows)


@pytest.fixture(scope="session")
def base_model(backbone_config, tokenizer, tmp_path_factory):
    """A random Qwen2.5-VL with its head that starts as gve-mini-base does."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base")
    Qwen2_5_VLForConditionalGeneration(backbone_config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def recipe(pairs_repo, base_model, tmp_path_factory):
    """A YAML recipe of a few steps."""
    settings = {
        "model": str(base_model),
        "pairs": str(pairs_repo),
        "tasks": ["t2t", "t2v", "i2v"],
        "max_tokens_per_frame": 17,
        "batch_size": 4,
        "task_hard_negatives": {"t2v": 2},
        "epochs": 3,
        "steps_per_epoch": STEPS // 3,
        "probe_pairs": 6,
        "learning_rate": 0.002,
        "cpu_threads": 1,
        "save_steps": 2,
        "mask_margin": None,
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
