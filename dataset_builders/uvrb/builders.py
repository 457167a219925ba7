"""`datasets` builder of UVRB's tables, from rows that `build.py` laid out as JSONL with the paths of their media."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets

from dataset_builders.hub_layout import TABLES
from dataset_builders.uvrb.tasks import TASKS


STRING = datasets.Value("string")
INDEX_SIDE = {
    "text": STRING,
    "image_file": STRING,
    "video_file": STRING,
    "sha256": STRING,
    "duration_s": datasets.Value("float64"),
}
# The index flavour has the media's names in place of the media.
INDEX_TABLES = {
    **TABLES,
    "corpus": datasets.Features({"id": STRING, **INDEX_SIDE}),
    "queries": datasets.Features({"id": STRING, **INDEX_SIDE}),
    "default": datasets.Features(
        {
            "id": STRING,
            "dataset": STRING,
            **INDEX_SIDE,
            **{
                name: TABLES["default"][name] for name in ("instruction", "abilities", "relevant_ids", "candidate_ids")
            },
        }
    ),
}


@dataclass
class UVRBConfig(datasets.BuilderConfig):
    """`name` is a table; `rows` the JSONL file of its rows, of which those from `start` to `stop` are written."""

    rows: str = ""
    start: int = 0
    stop: int | None = None
    index: bool = False

    @property
    def features(self):
        return (INDEX_TABLES if self.index else TABLES)[self.name.rpartition("-")[2]]


class UVRB(datasets.GeneratorBasedBuilder):
    """The 16 datasets of UVRB (arXiv 2510.27571, section 3)."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = UVRBConfig
    BUILDER_CONFIGS = [
        UVRBConfig(name=name) for name in ("default", *(config for task in TASKS.values() for config in task.configs))
    ]
    DEFAULT_CONFIG_NAME = "default"
    DEFAULT_WRITER_BATCH_SIZE = 100  # rows held in memory at once: a row of the file flavour may be a whole video

    def _info(self):
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("test")]

    def _generate_examples(self):
        with open(self.config.rows, encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, self.config.start, self.config.stop)):
                row = json.loads(line)
                yield number, {name: _embedded(value) for name, value in row.items()}


def _embedded(value):
    return {"bytes": Path(value["path"]).read_bytes(), "path": None} if isinstance(value, dict) else value
