"""Commands of tiny training runs, and what they leave behind."""

import json
import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
STEPS = 12
SCRIPT = [sys.executable, str(ROOT / "training/pyramid.py")]


def launcher(ranks):
    """Words that start CPU ranks; `--cpu --num_processes 2` would start one."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
    return [*words, "--main_process_port", "0"]


def environment(**extra):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def words_of(recipe, output_dir, *words):
    return ["--config", str(recipe), "--output_dir", str(output_dir), *words]


def steps_of(output_dir):
    lines = (output_dir / "run/log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
