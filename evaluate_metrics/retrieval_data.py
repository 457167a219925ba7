"""Reads one dataset of the benchmark repo: corpus, queries, relevance and candidates; media stay undecoded."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets

from dataset_builders.uvrb.tasks import Task


MODALITIES = ("text", "image", "video")


class UvrbError(ValueError):
    """Something that the caller of the runner can put right; its message is one line."""


@dataclass
class Side:
    """The corpus or the queries of one dataset.

    Args:
        rows (`datasets.Dataset`): columns `id` and some of `text`, `image`, `video`; media undecoded.
    """

    rows: datasets.Dataset

    def __len__(self):
        return len(self.rows)

    @cached_property
    def ids(self) -> list[str]:
        return list(self.rows["id"])

    @cached_property
    def digests(self) -> list[str]:
        """Hash of each item's content; the ids are not part of it."""
        return [digest_item(item) for item in self.items(range(len(self)))]

    @property
    def text_lengths(self) -> list[int]:
        """Characters of each item's text, 0 without one."""
        if "text" not in self.rows.column_names:
            return [0] * len(self)
        return [len(text or "") for text in self.rows["text"]]

    def items(self, indices):
        """Yields the items of these rows as `encode` takes them: dicts of what a row has of text, image and video."""
        columns = [name for name in MODALITIES if name in self.rows.column_names]
        for row in self.rows.select_columns(columns).select(indices):
            yield {name: value for name, value in row.items() if value is not None}


@dataclass
class RetrievalData:
    """One dataset of the benchmark, ready to be embedded and scored.

    Args:
        task (`Task`): what it is.
        corpus (`Side`): N videos.
        queries (`Side`): Q queries.
        relevant (`dict[str, list[str]]`): corpus ids by query id, at least one each.
        candidates (`dict[str, list[str]]`, *optional*): corpus ids that each query ranks; the whole corpus if `None`.
    """

    task: Task
    corpus: Side
    queries: Side
    relevant: dict[str, list[str]]
    candidates: dict[str, list[str]] | None = None

    def __post_init__(self):
        key, corpus_ids = self.task.key, set(self.corpus.ids)
        for query in self.queries.ids:
            if query not in self.relevant:
                raise UvrbError(f"{key}: query {query!r} has no relevant video in {key}-qrels; rebuild the benchmark.")
            if self.candidates is not None and not self.candidates.get(query):
                raise UvrbError(f"{key}: query {query!r} has no list in {key}-top_ranked; rebuild the benchmark.")
        for part, lists in (("qrels", self.relevant), ("top_ranked", self.candidates or {})):
            unknown = {name for names in lists.values() for name in names} - corpus_ids
            if unknown:
                raise UvrbError(
                    f"{key}-{part} names {min(unknown)!r}, which {key}-corpus lacks; rebuild the benchmark."
                )

    @property
    def n_ranked(self) -> list[int]:
        """How many videos each query ranks."""
        return [
            len(self.corpus) if self.candidates is None else len(self.candidates[name]) for name in self.queries.ids
        ]

    @property
    def n_relevant(self) -> list[int]:
        """How many of the videos that a query ranks are relevant."""
        if self.candidates is None:
            return [len(self.relevant[name]) for name in self.queries.ids]
        return [len(set(self.relevant[name]) & set(self.candidates[name])) for name in self.queries.ids]


def digest_item(item):
    """SHA-256 of one item's modalities and their bytes, as hex digits."""
    digest = hashlib.sha256()
    for name in MODALITIES:
        if name in item:
            content = _content(item[name])
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def config_names(benchmark):
    """Names of the benchmark's configs.

    Args:
        benchmark (`str`): a folder, or a dataset repo of the Hub.

    Raises:
        UvrbError: neither is there.
    """
    looks_local = benchmark.startswith((".", "/", "~")) or benchmark.count("/") > 1
    if looks_local and not Path(benchmark).is_dir():
        raise UvrbError(f"No benchmark at {benchmark}: build it first (python -m dataset_builders.mini uvrb).")
    try:
        return set(datasets.get_dataset_config_names(benchmark))
    except Exception as error:  # datasets and the Hub client raise a dozen kinds here
        raise UvrbError(f"No benchmark at {benchmark}: {first_line(error)}") from error


def load_retrieval_data(benchmark, task):
    """Loads one dataset of the benchmark.

    Args:
        benchmark (`str`): a folder, or a dataset repo of the Hub.
        task (`Task`): which one.

    Raises:
        UvrbError: a config cannot be read, or relevance and ids do not fit together.
    """
    cache = _cache_folder(benchmark)
    corpus, queries, qrels, *rest = (_load(benchmark, config, cache) for config in task.configs)
    relevant = {}
    for query, document, score in zip(qrels["query-id"], qrels["corpus-id"], qrels["score"]):
        if score > 0:
            relevant.setdefault(query, []).append(document)
    candidates = dict(zip(rest[0]["query-id"], rest[0]["corpus-ids"])) if rest else None
    return RetrievalData(task, Side(undecoded(corpus)), Side(undecoded(queries)), relevant, candidates)


def undecoded(rows):
    """A `datasets.Dataset` whose images and videos come as they are stored."""
    media = {"image": datasets.Image(decode=False), "video": datasets.Video(decode=False)}
    for name in set(media) & set(rows.column_names):
        rows = rows.cast_column(name, media[name])
    return rows


def first_line(error):
    """The first line of what an error says, or its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cache_folder(benchmark):
    """A cache of its own for each version of a local benchmark.

    `datasets` keys its cache of a local repo by the folder's name and the YAML of its card, neither by its path nor by
    its files: a benchmark that was rebuilt would be read as it was before.
    """
    folder = Path(benchmark).expanduser()
    if not folder.is_dir():
        return None  # on the Hub the commit is part of the key
    stats = [(str(path), path.stat()) for path in sorted(folder.resolve().rglob("*.parquet"))]
    version = hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "uvrb" / version.hexdigest()[:16])


def _load(benchmark, config, cache):
    try:
        return datasets.load_dataset(benchmark, config, split="test", cache_dir=cache)
    except Exception as error:
        raise UvrbError(f"Cannot load {config} of {benchmark}: {first_line(error)}") from error


def _content(value):
    if isinstance(value, str):
        return value.encode()
    if hasattr(value, "frames"):  # decoded already
        return value.frames.tobytes() + value.times.tobytes()
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
