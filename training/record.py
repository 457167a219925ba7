"""What a training run leaves behind: the step log, the GVE repo with its record, and the push to the Hub."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import HfApi

from hub_cards.repos import IGNORED
from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files


LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "trl")


class StepLog:
    """`log.jsonl` of a run: a line an epoch, a line a step. A resumed run drops what its checkpoint does not know."""

    def __init__(self, run_dir, step, epochs, enabled):
        self._file = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path, kept = run_dir / "log.jsonl", []
        if step and path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            records = [(line, json.loads(line)) for line in lines]
            kept = [line for line, record in records if record["step"] <= step and record["epoch"] < epochs]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._file = open(path, "a")

    def write(self, record):
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def save_repo(model, processor, output_dir, record, state=None):
    """Write the GVE repo: weights, processor, the code that loads them, and `training_run.json`.

    Args:
        state (`dict`, *optional*): the model's state dict, gathered from shards.
    """
    model.save_pretrained(output_dir, state_dict=state)
    processor.save_pretrained(output_dir)
    write_sentence_transformers_files(output_dir, model.config)
    (Path(output_dir) / "training_run.json").write_text(json.dumps(record, indent=1) + "\n")


def push(output_dir, hub_model_id):
    """Push the GVE repo with a card made of what lies in it, but nothing of the run; returns its address."""
    from hub_cards.render import render_model_card  # cards need packages that training does without

    render_model_card(output_dir, *hub_model_id.split("/")).save(Path(output_dir) / "README.md")
    api = HfApi()
    url = api.create_repo(hub_model_id, exist_ok=True)
    api.upload_folder(repo_id=hub_model_id, folder_path=output_dir, ignore_patterns=list(IGNORED))
    return url


def report_skipped(run):
    """Print how many pairs and negatives could not be read, and list them in `skipped.jsonl`."""
    path = Path(run.training.run_dir) / "skipped.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item._asdict()) + "\n" for item in run.skipped))
    if run.skipped:
        first = run.skipped[0]
        print(f"skipped {len(run.skipped)} unreadable sides of pairs, see {path}; the first: {first.reason}")


def draw_curriculum(history, path):
    """Plot R_k, D_k, P(k) and the share of the draws of each task by epoch.

    Args:
        history (list of `dict`): of each epoch `epoch`, `relevance`, `difficulty`, `probabilities` and `draws`, all
            but the first by task.
        path (`str` or `os.PathLike`): the picture to write.
    """
    import matplotlib  # slow to import, and needed at the end of a run only

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.5), layout="constrained")
    epochs = [plan["epoch"] + 1 for plan in history]
    for task in history[0]["probabilities"]:
        shares = [plan["draws"].get(task, 0) / sum(plan["draws"].values()) for plan in history]
        curves = [[plan[name][task] for plan in history] for name in ("relevance", "difficulty", "probabilities")]
        curves.append(shares)
        for axis, values in zip(axes, curves):
            axis.plot(epochs, values, marker="o", label=task)
    titles = ("R_k: mean cosine of the probe", "D_k: what is left of its loss", "P(k)", "share of the steps")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="epoch", xticks=epochs)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def format_shares(probabilities):
    """`t2v 0.31, v2v 0.12` of probabilities by task."""
    return ", ".join(f"{task} {share:.2f}" for task, share in probabilities.items())


def training_record(run, outcome):
    """What `training_run.json` says of the run.

    Args:
        run ([`Run`]): as it was trained.
        outcome (`dict`): what `train` returned.
    """
    processes = run.accelerator.num_processes
    return {
        "command": shlex.join(["accelerate", "launch", "training/pyramid.py", *sys.argv[1:]]),
        "summary": {
            "steps": outcome["step"],
            "pairs": sum(len(stream) for stream in run.streams.values()),
            "sides of pairs that could not be read": len(run.skipped),
            "time": f"{outcome['seconds'] / 60:.1f} minutes, {processes} x {torch.get_num_threads()} threads",
            **{
                f"P(task) of epoch {plan['epoch'] + 1}": format_shares(plan["probabilities"])
                for plan in outcome["history"]
            },
        },
        "settings": run.settings,
        "data": {"pairs": run.data.pairs, "skipped": len(run.skipped), "tasks": _task_records(run, outcome)},
        "curriculum": outcome["history"],
        "warnings": outcome["warnings"],
        "seconds": outcome["seconds"],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def _task_records(run, outcome):
    return {
        task: {
            "pairs": len(stream),
            "batches": outcome["batches"].get(task, 0),
            "batch_size": stream.batch_size,
            "hard_negatives": stream.hard_negatives,
        }
        for task, stream in run.streams.items()
    }
