"""The public part of the training mixture: each upstream dataset's columns mapped to the project's pairs.

`collected.yaml` holds a declaration a dataset and direction; nothing here knows any dataset by name. A place in a row
is a dotted path (`passages.passage_text`, `pos_cand_list.0.did`); a medium is a column of bytes, or a file that a
template of columns names below the folder of media (`--media`), since most upstreams publish paths or addresses only.

```bash
python -m dataset_builders.synflow.collected WebVid T-V --media /data/webvid --limit 1000 --output build/hub/org/webvid
```
"""

import argparse
import os
import string
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import datasets
import yaml
from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm

from dataset_builders.synflow.publish import write_parquet
from dataset_builders.synflow.recipe import RecipeError, Settings
from dataset_builders.synflow.store import write_whole


MAPPINGS = Path(__file__).with_name("collected.yaml")
TEXT = datasets.Value("string")
SIDE = {"text": TEXT, "image": datasets.Image(), "video": datasets.Video()}
PAIR = datasets.Features(
    {
        **{f"query_{name}": kind for name, kind in SIDE.items()},
        **{f"target_{name}": kind for name, kind in SIDE.items()},
        "negatives": datasets.List(SIDE),
        "instruction": TEXT,
        "task": TEXT,
        "source_id": TEXT,
    }
)
MAX_MEDIUM_BYTES = 1 << 30
LETTERS = {"T": "text", "I": "image", "V": "video"}


class Place(Settings):
    """Where a text or a medium is: one of the three.

    `column` is a dotted path. `file` is a template of dotted paths in braces, naming a file below the media folder.
    `one_of` is a list column, of which the entries are taken whose partner in the list column `where` equals `is`, or
    is `among` (or `beyond`) the values of another column.
    """

    column: str | None = None
    file: str | None = None
    one_of: str | None = None
    where: str | None = None
    equals: int | str | bool | None = Field(None, alias="is")
    among: str | None = None
    beyond: str | None = None
    template: str | None = None  # such as "a photo of a {}", put around a text

    @model_validator(mode="after")
    def one_kind(self):
        if sum(value is not None for value in (self.column, self.file, self.one_of)) != 1:
            raise ValueError("give one of column, file, one_of")
        return self


class Item(Settings):
    text: Place | None = None
    image: Place | None = None
    video: Place | None = None


class Pool(Settings):
    """Another table to which a row refers by id: its key, and the items in it."""

    data_files: str | None = None
    config: str | None = None
    split: str = "train"
    key: str
    item: Item


class Mapping(Settings):
    """One dataset in one direction.

    `target` and `negatives` are items in the row, or, with a `pool`, `target_ids` and `negative_ids` refer to it.
    """

    dataset: str
    part: str
    direction: str = Field(pattern="^(T|I|V|TI|TV)-(T|I|V|TI|TV)$")
    repo: str
    config: str | None = None
    split: str = "train"
    data_files: str | None = None
    source_id: str
    query: Item
    target: Item | None = None
    negatives: Item | None = None
    pool: Pool | None = None
    target_ids: str | None = None
    negative_ids: str | None = None
    keep_if: dict[str, str] = {}  # columns that must have these values
    instruction: str
    checked: str  # against what the layout was checked
    note: str | None = None

    @property
    def task(self):
        return self.direction.lower().replace("-", "2")

    @model_validator(mode="after")
    def has_target(self):
        if (self.target is None) == (self.pool is None or self.target_ids is None):
            raise ValueError("give either target, or pool and target_ids")
        return self


@lru_cache(maxsize=1)
def load_mappings(path=MAPPINGS):
    """`{(dataset, direction): Mapping}` of the YAML file."""
    try:
        entries = [Mapping(**entry) for entry in yaml.safe_load(Path(path).read_text())]
    except ValidationError as error:
        raise RecipeError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    return {(entry.dataset, entry.direction): entry for entry in entries}


class SkippedRow(ValueError):
    """A row that makes no pair; its text is the reason's name."""


def value_at(row, path):
    """What lies at a dotted path; None where it ends early.

    A list is entered by number, or in all its entries by a name or, where they are lists, by `*`; entries that are no
    objects stand for themselves.
    """
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part == "*":
            entries = row if isinstance(row, (list, tuple)) else []
            return [value_at(entry, ".".join(parts[place + 1 :])) for entry in entries]
        if isinstance(row, (list, tuple)):
            if part.isdigit():
                row = row[int(part)] if int(part) < len(row) else None
            else:
                row = [entry.get(part) if isinstance(entry, dict) else entry for entry in row]
        elif isinstance(row, dict):
            row = row.get(part)
        else:
            return None
    return row


def _values(row, place):
    """All that a place names in a row, as a list."""
    if place.one_of is not None:
        entries, partners = value_at(row, place.one_of) or [], value_at(row, place.where) or []
        if place.among is not None:
            return [e for e, partner in zip(entries, partners) if partner in (value_at(row, place.among) or ())]
        if place.beyond is not None:
            return [e for e, partner in zip(entries, partners) if partner not in (value_at(row, place.beyond) or ())]
        return [entry for entry, partner in zip(entries, partners) if partner == place.equals]
    if place.file is not None:
        names = [name for _, name, _, _ in string.Formatter().parse(place.file) if name]
        columns = {name: value_at(row, name) for name in names}
        if any(value is None or value == "" for value in columns.values()):
            return []
        # A list of names stands for as many files.
        counts = [len(value) for value in columns.values() if isinstance(value, list)]
        return [_filled(place.file, columns, number) for number in range(min(counts, default=1))]
    value = value_at(row, place.column)
    values = value if isinstance(value, list) else [value]
    return [value for value in values if value is not None and value != ""]


def _filled(template, columns, number):
    for name, value in columns.items():
        template = template.replace(f"{{{name}}}", str(value[number] if isinstance(value, list) else value))
    return template


class Collector:
    """Pairs of one mapping.

    Args:
        mapping (`Mapping`): which.
        media (`str`, *optional*): folder of pictures and videos.
        repo (`str`, *optional*): folder or Hub name in place of the mapping's.
        negatives (`int`): at most so many hard negatives a pair.
    """

    def __init__(self, mapping, media=None, repo=None, negatives=1):
        self.mapping, self.negatives = mapping, negatives
        self.media = Path(media).resolve() if media else None
        self.repo = repo or mapping.repo
        self.skipped = Counter()
        self._pool = None

    def __iter__(self):
        rows = self._load(self.mapping.config, self.mapping.split, self.mapping.data_files, streaming=True)
        labels = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(rows):
            row = {name: labels[name].int2str(v) if name in labels and v is not None else v for name, v in row.items()}
            try:
                yield self._pair(row, number)
            except SkippedRow as error:
                self.skipped[str(error)] += 1

    def _load(self, config, split, data_files, streaming):
        source = {"path": self.repo, "name": config}
        if data_files and Path(self.repo).is_dir():  # a checked-out copy, whose files say what they are
            kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
            kind = kinds[Path(data_files).suffix]
            source, data_files = {"path": kind}, str(Path(self.repo) / data_files)
        try:
            rows = datasets.load_dataset(**source, split=split, data_files=data_files, streaming=streaming)
        except (OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            raise RecipeError(f"{self.mapping.dataset}: cannot load {self.repo} ({problem})") from error
        return rows.decode(False) if streaming and rows.features else rows

    def _pair(self, row, number):
        mapping = self.mapping
        for column, wanted in mapping.keep_if.items():
            if str(value_at(row, column)) != wanted:
                raise SkippedRow("not_of_this_direction")
        query = self._item(row, mapping.query, mapping.direction.partition("-")[0])
        letters = mapping.direction.partition("-")[2]
        if mapping.target is not None:
            target = self._item(row, mapping.target, letters)
            negatives = self._row_negatives(row, letters)
        else:
            target = self._referred(value_at(row, mapping.target_ids), letters, 1)
            if not target:
                raise SkippedRow("target_missing")
            target, negatives = target[0], self._referred_negatives(row, letters)
        return {
            **{f"query_{name}": value for name, value in query.items()},
            **{f"target_{name}": value for name, value in target.items()},
            "negatives": negatives,
            "instruction": mapping.instruction,
            "task": mapping.task,
            "source_id": f"{mapping.dataset}/{value_at(row, mapping.source_id) or number}",
        }

    def _item(self, row, item, letters, choice=0):
        """One side of a pair; what its letters name has to be there."""
        side = dict.fromkeys(SIDE)
        for letter in letters:
            name = LETTERS[letter]
            place = getattr(item, name)
            values = _values(row, place) if place else []
            if choice >= len(values):
                raise SkippedRow(f"{name}_missing")
            side[name] = self._text(values[choice], place) if name == "text" else self._medium(values[choice], place)
        return side

    def _text(self, value, place):
        text = " ".join((" ".join(value) if isinstance(value, list) else str(value)).split())
        if not text:
            raise SkippedRow("text_missing")
        return place.template.format(text) if place.template else text

    def _medium(self, value, place):
        if place.file is None:
            data = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, dict) else None
            if data is None:
                raise SkippedRow("medium_missing")
            return {"bytes": data, "path": None}
        if self.media is None:
            raise RecipeError(f"{self.mapping.dataset}: publishes no files; name the folder that has them (--media)")
        path = (self.media / value).resolve()
        if not path.is_relative_to(self.media):
            raise SkippedRow("path_outside_the_folder")
        if not path.is_file():
            raise SkippedRow("file_missing")
        if not 0 < os.path.getsize(path) <= MAX_MEDIUM_BYTES:
            raise SkippedRow("file_empty_or_too_large")
        return {"bytes": path.read_bytes(), "path": None}

    def _row_negatives(self, row, letters):
        found = []
        while self.mapping.negatives is not None and len(found) < self.negatives:
            try:
                found.append(self._item(row, self.mapping.negatives, letters, len(found)))
            except SkippedRow:
                break
        return found

    def _referred_negatives(self, row, letters):
        if self.mapping.negative_ids is None:
            return []
        return self._referred(value_at(row, self.mapping.negative_ids), letters, self.negatives)

    def _referred(self, ids, letters, most):
        """Items of the pool by their ids, as many as there are up to `most`."""
        found = []
        for key in ids if isinstance(ids, list) else [ids]:
            number = self.pool[1].get(key)
            if number is None or len(found) == most:
                continue
            try:
                found.append(self._item(self.pool[0][number], self.mapping.pool.item, letters))
            except SkippedRow:
                continue
        return found

    @property
    def pool(self):
        """The table that rows refer to, memory-mapped, and its rows by key."""
        if self._pool is None:
            pool = self.mapping.pool
            table = self._load(pool.config, pool.split, pool.data_files, streaming=False)
            self._pool = table, {key: number for number, key in enumerate(table[pool.key])}
        return self._pool


def collect(collector, output, limit=None, rows_per_shard=2000):
    """Writes the pairs as a repo for `load_dataset`; returns how many."""
    shard, count, paths, task = [], 0, [], collector.mapping.task

    def flush():
        if shard:
            written = write_parquet(Path(output) / f"data/{task}/train-{len(paths):05d}", shard, PAIR)
            paths.append(str(written.relative_to(output)))
            shard.clear()

    for pair in tqdm(collector, desc=collector.mapping.dataset, unit="pair"):
        shard.append(pair)
        count += 1
        if len(shard) == rows_per_shard:
            flush()
        if count == limit:
            break
    flush()
    if not count:
        raise RecipeError(f"{collector.mapping.dataset}: no row makes a pair ({dict(collector.skipped)})")
    files = [{"split": "train", "path": paths}]
    configs = [{"config_name": "all", "data_files": files, "default": True}]
    configs.append({"config_name": task, "data_files": files})
    front = yaml.safe_dump({"license": "other", "configs": configs}, sort_keys=False)
    skipped = "".join(f"- {reason}: {number}\n" for reason, number in sorted(collector.skipped.items()))
    title = f"# {collector.mapping.dataset}, {collector.mapping.direction}\n\n{count} pairs."
    write_whole(Path(output) / "README.md", f"---\n{front}---\n{title}\n\nLeft out:\n\n{skipped or '- nothing'}\n")
    return count


def main(words=None):
    parser = argparse.ArgumentParser(
        prog="python -m dataset_builders.synflow.collected", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("dataset", help=f"one of {sorted({name for name, _ in load_mappings()})}")
    parser.add_argument("direction", help="such as T-V")
    parser.add_argument("--repo", help="folder or Hub name in place of the upstream's")
    parser.add_argument("--media", help="folder of pictures and videos")
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args(words)
    try:
        mapping = load_mappings().get((arguments.dataset, arguments.direction))
        if mapping is None:
            known = ", ".join(f"{name} {direction}" for name, direction in load_mappings())
            raise RecipeError(f"no mapping of {arguments.dataset} {arguments.direction}; there are {known}")
        collector = Collector(mapping, arguments.media, arguments.repo, arguments.negatives)
        count = collect(collector, arguments.output, arguments.limit)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {count} pairs to {arguments.output}; left out {dict(collector.skipped) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
