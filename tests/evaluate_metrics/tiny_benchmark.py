"""A benchmark of 16 tiny datasets on disk, and a stub model repo that is loaded as a real one.

The "videos" and "images" are bytes that end in a number; the stub's vector of an item is a direction of its own for
each number, so a query finds the video of its number.
"""

import json

import yaml
from datasets import Dataset, Features, Image, List, Value, Video
from safetensors.torch import save_file
from torch import zeros

from dataset_builders.uvrb.tasks import TASKS


SHARED = {"crb_s": "crb_g", "crb_t": "crb_g", "vdc_d": "vdc_o", "lovr_c2v": "lovr_v", "msrvtt_i2v": "msrvtt"}
N_CORPUS = 12
MEDIA = {"image": Image(), "video": Video()}

STUB = """
import os
import re

import torch
from transformers import PretrainedConfig, PreTrainedModel


class StubConfig(PretrainedConfig):
    model_type = "uvrb_stub"

    def __init__(self, shift=0, **kwargs):
        super().__init__(**kwargs)
        self.shift = shift  # added to a query's number: anything but 0 is always wrong


class StubModel(PreTrainedModel):
    config_class = StubConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(1, 1)
        self.post_init()

    def encode(self, items, instruction=None, batch_size=32, errors="raise", report=None):
        with open(os.environ["STUB_LOG"], "a") as log:
            print(os.environ.get("RANK", "0"), len(items), instruction, file=log)
        if os.path.getsize(os.environ["STUB_LOG"]) > int(os.environ.get("STUB_LIMIT", 1 << 30)):
            raise RuntimeError("killed")
        return torch.stack([self.vector(*pair, instruction, report) for pair in enumerate(items)])

    def vector(self, index, item, instruction, report):
        text = " ".join(v if isinstance(v, str) else v["bytes"].decode() for v in item.values())
        if "broken" in text:
            report.append({"index": index, "reason": "no frames"})
            return torch.full((16,), float("nan"))
        number = int(re.findall("[0-9]+", text)[-1]) + (self.config.shift if instruction else 0)
        return torch.randn(16, generator=torch.Generator().manual_seed(number % 12))
"""


def media(kind, number):
    return {"bytes": f"{kind} {number}".encode(), "path": None}


def query_row(task, number):
    """A query for the video of that number, in the task's modality."""
    row = {"id": f"q{number}"}
    for name in task.query_modality.split("+"):
        row[name] = f"{task.key} {number}" if name == "text" else media(name, number)
    return row


def write(folder, config, rows, features):
    path = folder / config / "test.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)


def write_benchmark(folder, keys=tuple(TASKS), corpus=None, query=query_row, change=None):
    """Writes the configs of these datasets and the README that names them.

    Args:
        folder (`Path`): of the repo.
        keys (sequence of `str`): dataset keys.
        corpus (list of dicts, *optional*): rows of every corpus; 12 stub videos of its own by default.
        query (callable): `query(task, number)`, a row.
        change (callable, *optional*): `change(config, rows)` alters rows before they are written.
    """
    string, files = Value("string"), {}
    for task in (TASKS[key] for key in keys):
        owner = SHARED.get(task.key, task.key)
        videos = corpus or [{"id": f"v{n}", "video": media(f"{owner} video", n)} for n in range(N_CORPUS)]
        columns = {name: MEDIA.get(name, string) for name in ("id", *task.query_modality.split("+"))}
        parts = {
            "corpus": (videos, {"id": string, "video": Video()}),
            "queries": ([query(task, n) for n in range(len(videos))], columns),
            "qrels": (
                [{"query-id": f"q{n}", "corpus-id": f"v{n}", "score": 1} for n in range(len(videos))],
                {"query-id": string, "corpus-id": string, "score": Value("int64")},
            ),
            "top_ranked": (
                [
                    {"query-id": f"q{n}", "corpus-ids": [f"v{(n + step) % len(videos)}" for step in range(4)]}
                    for n in range(len(videos))
                ],
                {"query-id": string, "corpus-ids": List(string)},
            ),
        }
        for config in task.configs:
            rows, features = parts[config.removeprefix(f"{task.key}-")]
            path = f"{owner}-corpus" if config.endswith("-corpus") else config
            files[config] = f"{path}/test.parquet"
            write(folder, path, change(config, rows) if change else rows, features)
    configs = [{"config_name": c, "data_files": [{"split": "test", "path": path}]} for c, path in files.items()]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return str(folder)


def write_stub(folder, shift=0):
    """Writes a model repo whose code travels with it."""
    folder.mkdir(parents=True)
    (folder / "modeling_stub.py").write_text(STUB)
    auto_map = {"AutoConfig": "modeling_stub.StubConfig", "AutoModel": "modeling_stub.StubModel"}
    config = {"model_type": "uvrb_stub", "architectures": ["StubModel"], "auto_map": auto_map, "shift": shift}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"linear.weight": zeros(1, 1), "linear.bias": zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
