"""The UVRD builder: Parquet shards that `load_dataset` reads, one config a format, provenance on every row.

`media: embedded` puts each picture and video into the rows that use it. `media: referenced` keeps each once, in the
config `media`, and rows name it by path: `referenced_media.MediaIndex` puts the bytes back.
"""

import os
import uuid
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep

from dataset_builders.hub_layout import file_hash


TEXT, NUMBER = datasets.Value("string"), datasets.Value("float32")
ROWS_A_GROUP = {"embedded": 64, "referenced": 512}  # small row groups: a stream that shuffles holds little at a time


def features(media):
    """The columns of a config of pairs."""
    decode = media == "embedded"
    side = {"text": TEXT, "image": datasets.Image(decode=decode), "video": datasets.Video(decode=decode)}
    return datasets.Features(
        {
            **{f"query_{name}": kind for name, kind in side.items()},
            **{f"target_{name}": kind for name, kind in side.items()},
            "negatives": datasets.List(side),
            "instruction": TEXT,
            "task": TEXT,
            "source_id": TEXT,
            "target_id": TEXT,
            "pair_id": TEXT,
            "span": datasets.List(NUMBER),
            "caption_style": TEXT,
            "prompt_hash": TEXT,
            "captioner": TEXT,
            "scores": {name: NUMBER for name in ("similarity", "motion", "relation")},
        }
    )


MEDIA = datasets.Features({"path": TEXT, "data": datasets.Value("large_binary")})
SIDES = ("text", "image", "video")


def media_names(recipe, work):
    """`name(file)` in the dataset: the same wherever the run's and the sources' folders lie."""
    roots = [(Path(source.folder).resolve(), f"{source.id}/") for source in recipe.sources if source.kind == "files"]
    roots = [(f"{folder}/", prefix) for folder, prefix in [*roots, (Path(work).resolve(), "")]]

    def name(file):
        for root, prefix in roots:
            if file.startswith(root):
                return prefix + file.removeprefix(root)
        raise ValueError(f"{file}: lies in none of {', '.join(root for root, _ in roots)}")

    return name


class Publisher(PipelineStep):
    """Turns a task's share of `paired/*.jsonl` into Parquet, each shard written whole."""

    type, name = "📦", "publisher"

    def __init__(self, recipe, work, output):
        super().__init__()
        self.recipe, self.work, self.output = recipe, Path(work), Path(output)
        self._name_of = media_names(recipe, work)

    def run(self, data=None, rank=0, world_size=1):
        shards = sorted((self.work / "paired").glob("*.jsonl"))
        for path in shards[rank::world_size]:
            task, split, _ = path.name.split("-", 2)
            target = self.output / "data" / task / path.stem.removeprefix(f"{task}-")
            if is_written(target):
                continue
            with self.track_time("shard"), path.open("rb") as lines:
                rows = (self._row(orjson.loads(line)) for line in lines)
                media = self.recipe.output.media
                write_parquet(target, rows, features(media), ROWS_A_GROUP[media])
        if self.recipe.output.media == "referenced":
            self._write_media(rank, world_size)
        yield from ()

    def _row(self, pair):
        row = {name: pair[name] for name in features("embedded") if name in pair}
        for side in ("query", "target"):
            row |= {f"{side}_{name}": value for name, value in self._side(pair[side]).items()}
        return {**row, "negatives": [self._side(negative) for negative in pair["negatives"]]}

    def _side(self, side):
        return {"text": side.get("text"), **{name: self._medium(side.get(name)) for name in ("image", "video")}}

    def _medium(self, file):
        if file is None:
            return None
        if self.recipe.output.media == "embedded":
            return {"bytes": Path(file).read_bytes(), "path": None}
        return {"bytes": None, "path": self._name_of(file)}

    def _write_media(self, rank, world_size):
        """This task's share of all media, told by their names, so that each is written once."""
        files = orjson.loads((self.work / "paired" / "media.json").read_bytes())
        names = list(files)
        size = self.recipe.output.rows_per_shard
        total = max(1, -(-len(names) // size))
        for number in range(rank, total, world_size):
            target = self.output / "data" / "media" / f"train-{number:05d}-of-{total:05d}"
            if not is_written(target):
                chosen = names[number * size : (number + 1) * size]
                rows = ({"path": name, "data": Path(files[name]).read_bytes()} for name in chosen)
                write_parquet(target, rows, MEDIA)


def is_written(stem):
    """Whether a shard is there, whatever its content's hash."""
    return any(stem.parent.glob(f"{stem.name}-*.parquet"))


def write_parquet(stem, rows, columns, rows_a_group=ROWS_A_GROUP["embedded"]):
    """Rows as `<stem>-<hash>.parquet`, a few in memory at a time, whole or not at all; same rows, same bytes.

    The hash of the content stands in the name, and so in the card's YAML, because `load_dataset` takes a local folder
    whose file names have not changed for the one that it has in its cache.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    temporary = stem.with_name(f".{stem.name}.{uuid.uuid4().hex[:8]}")
    rows, schema = iter(rows), columns.arrow_schema
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_index=True) as writer:
            while group := list(islice(rows, rows_a_group)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        path = stem.with_name(f"{stem.name}-{file_hash(temporary)[:12]}.parquet")
        os.replace(temporary, path)
        return path
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(output, columns=None):
    """All rows of pairs in an output folder, shard by shard, without media unless asked for."""
    columns = columns or [
        name for name in features("embedded") if not name.endswith(("_image", "_video", "negatives"))
    ]
    for path in sorted(Path(output).glob("data/*/*.parquet")):
        if path.parent.name != "media":
            for batch in pq.ParquetFile(path).iter_batches(256, columns=columns):
                for row in batch.to_pylist():
                    yield {**row, "split": path.name.partition("-")[0]}


def quantiles(values):
    return np.percentile(np.array(list(values) or [0.0]), [5, 50, 95]).tolist()
