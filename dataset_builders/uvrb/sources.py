"""Where the 16 datasets come from: one abstract task, from which each source derives by overriding what differs.

A task is a corpus, queries, a mapping of relevance and, for some, candidates of each query; modality is a setting of
the task (arXiv 2510.27571, appendix A.5). This file holds the abstract task and the authors' release layout; the
original annotation files of the upstream datasets are in `upstream.py`, the index flavour in `join.py`.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dataset_builders.uvrb.tasks import TASKS, Task


@dataclass(frozen=True)
class Media:
    """A picture or a video of a source, not opened yet.

    Args:
        path (`Path`): of the file, or of a folder of frames.
        name (`str`): the path inside the source, for reports.
        kind (`str`): `"image"` or `"video"`: what it becomes.
        frame_of_video (`bool`): an image that has to be drawn from the video at `path`.
        sha256 (`str`): hash that the file should have, empty where the source does not say.
    """

    path: Path
    name: str
    kind: str
    frame_of_video: bool = False
    sha256: str = ""


@dataclass(frozen=True)
class Item:
    """A row of a corpus or of the queries."""

    id: str
    text: str | None = None
    image: Media | None = None
    video: Media | None = None

    @property
    def media(self):
        """Its picture and its video, as far as it has them."""
        return [part for part in (self.image, self.video) if part is not None]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a source, and what it cost.

    Args:
        dataset (`str`): key.
        side (`str`): `"corpus"`, `"queries"`, `"qrels"` or `"top_ranked"`.
        id (`str`): of the row.
        reason (`str`): one line.
    """

    dataset: str
    side: str
    id: str
    reason: str


@dataclass
class Records:
    """One dataset as its source has it: `problems` names what was left out of the rest."""

    task: Task
    corpus: list[Item]
    queries: list[Item]
    positives: dict[str, list[str]]
    candidates: dict[str, list[str]] | None = None
    problems: list[Problem] = field(default_factory=list)


class SourceError(ValueError):
    """A source that cannot be read at all; the message is one line with the remedy."""


class SourceTask(ABC):
    """One dataset of UVRB, read from some source.

    Args:
        task (`Task`): what it is.
    """

    def __init__(self, task):
        self.task = task
        self.problems = []

    @abstractmethod
    def corpus(self):
        """Yields an `Item` a video."""

    @abstractmethod
    def queries(self):
        """Yields an `Item` a query."""

    @abstractmethod
    def positives(self):
        """`dict[str, list[str]]`: corpus ids by query id."""

    def candidates(self):
        """`dict[str, list[str]]`: corpus ids that each query ranks, where it does not rank the whole corpus."""
        return None

    def read(self):
        """The dataset without what is faulty in itself, as `Records`.

        Raises:
            SourceError: the source has no such dataset, or its files are not what they should be.
        """
        corpus, queries = self._distinct("corpus", self.corpus()), self._distinct("queries", self.queries())
        return Records(self.task, corpus, queries, self.positives(), self.candidates(), self.problems)

    def report(self, side, id, reason):
        """Notes something that was left out."""
        self.problems.append(Problem(self.task.key, side, str(id), reason))

    def _distinct(self, side, items):
        kept = {}
        for item in items:
            if item.id in kept:
                self.report(side, item.id, "the id stands twice; the first row is kept")
            elif not is_inside(item.id) or not item.id.strip():
                self.report(side, item.id, "the id is empty or leaves its folder; the row is left out")
            elif reason := self._lacks(side, item):
                self.report(side, item.id, reason)
            else:
                kept[item.id] = item
        return list(kept.values())

    def _lacks(self, side, item):
        wanted = ["video"] if side == "corpus" else self.task.query_modality.split("+")
        missing = [name for name in wanted if not getattr(item, name)]
        return f"it has no {' and no '.join(missing)}; the row is left out" if missing else None


def is_inside(name):
    """Whether a path or id of a source stays inside its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_lines(path):
    """Rows of a JSONL file.

    Raises:
        SourceError: missing, or a line that is no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            rows = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    parsed = []
    for number, line in rows:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {number} is not a JSON object")
        parsed.append(row)
    return parsed


class ReleaseTask(SourceTask):
    """A dataset in the authors' release layout.

    `jsonl/queries.jsonl` holds `id` and some of `text`, `image`, `video`; `jsonl/corpus.jsonl` holds `id` and
    `video`; `jsonl/instances.jsonl` holds `qid` and `pos`. Pictures lie under `images/`, videos under `videos/` or
    as they are named, extracted ones as `videos_frames/<stem>/`.

    Args:
        task (`Task`): which one.
        root (`Path`): folder that holds `jsonl/`.
    """

    folders = {"image": ("", "images"), "video": ("", "videos")}

    def __init__(self, task, root):
        super().__init__(task)
        self.root = root

    def corpus(self):
        for row in read_lines(self.root / "jsonl" / "corpus.jsonl"):
            if item := self.item("corpus", row, ("video",)):
                yield item

    def queries(self):
        for row in read_lines(self.root / "jsonl" / "queries.jsonl"):
            if item := self.item("queries", row, self.task.query_modality.split("+")):
                yield item

    def instances(self):
        """Rows of `instances.jsonl` by query id; a query that stands twice has both rows' lists."""
        merged = {}
        for row in read_lines(self.root / "jsonl" / "instances.jsonl"):
            if "qid" not in row:
                raise SourceError(f"{self.root / 'jsonl' / 'instances.jsonl'} has a row without qid")
            lists = merged.setdefault(str(row["qid"]), {})
            for name, ids in row.items():
                if isinstance(ids, list):
                    lists[name] = list(dict.fromkeys([*lists.get(name, []), *map(str, ids)]))
        return merged

    def positives(self):
        return {query: lists.get("pos", []) for query, lists in self.instances().items()}

    def item(self, side, row, modalities):
        """`Item` of a row with what its modality asks for; `None`, and a report, if a file is missing."""
        parts = {}
        for name in modalities:
            value = row.get(name)
            if name == "text" or not value:
                parts[name] = value or None
                continue
            if not is_inside(str(value)):
                self.report(side, row.get("id"), f"its {name} {value!r} leaves the source; the row is left out")
                return None
            path = self.locate(name, str(value))
            if path is None:
                self.report(side, row.get("id"), f"its {name} {value!r} is missing; the row is left out")
                return None
            parts[name] = Media(path, path.relative_to(self.root).as_posix(), name)
        return Item(str(row.get("id", "")), **parts)

    def locate(self, kind, name):
        """The file of that name, or the folder of its frames; `None` if there is neither."""
        places = [self.root / folder / name for folder in self.folders[kind]]
        if kind == "video":
            places += [self.root / "videos_frames" / PurePosixPath(name).with_suffix("")]
            places += [self.root / "videos_frames" / PurePosixPath(name).stem]
        return next((place for place in places if place.exists()), None)


class SubfolderTask(ReleaseTask):
    """VDC: the videos lie one folder deeper, whether or not the name says so."""

    def locate(self, kind, name):
        found = super().locate(kind, name)
        if found is None and kind == "video":
            deeper = sorted(self.root.glob(f"videos/*/{_literal(PurePosixPath(name).name)}"))
            found = deeper[0] if deeper else None
        return found


class CandidateTask(ReleaseTask):
    """MomentSeeker: a query ranks its own list, the positives and the negatives that its instance names."""

    negative_keys = ("neg", "negs", "negatives", "cand", "cands", "candidates")

    def candidates(self):
        return {
            query: list(dict.fromkeys(sum((lists.get(name, []) for name in ("pos", *self.negative_keys)), [])))
            for query, lists in self.instances().items()
        }


RELEASE_CLASSES = {"vdc_o": SubfolderTask, "vdc_d": SubfolderTask, "ms_ti": CandidateTask, "ms_tv": CandidateTask}


def open_release(root, keys=None):
    """Tasks of a folder in the authors' release layout.

    Args:
        root (`str` or `Path`): where the archives were unpacked: `<DS>/UVRB/<DS>/` each, or the inner folders alone.
        keys (iterable of `str`, *optional*): which ones; by default all that are there.

    Returns:
        `list[ReleaseTask]`

    Raises:
        SourceError: nothing there, or a dataset that was asked for is missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise SourceError(f"no folder {root}; unpack the release there")
    found = {}
    for pattern in ("*", "UVRB/*", "*/UVRB/*"):
        for queries in sorted(root.glob(f"{pattern}/jsonl/queries.jsonl")):
            if key := key_of(queries.parent.parent.name):
                found.setdefault(key, queries.parent.parent)
    missing = [key for key in keys or () if key not in found]
    if missing or not found:
        wanted = ", ".join(TASKS[key].name for key in missing) or "jsonl/queries.jsonl of any dataset"
        raise SourceError(f"{root} lacks {wanted}; it holds {', '.join(sorted(found)) or 'no dataset'}")
    return [
        RELEASE_CLASSES.get(key, ReleaseTask)(TASKS[key], found[key])
        for key in TASKS
        if key in found and (keys is None or key in keys)
    ]


def key_of(folder):
    """Key of the dataset that a folder is named after: its name or its abbreviation, however spelt.

    >>> key_of("CRB-G"), key_of("CaReBench-General"), key_of("msrvtt_i2v"), key_of("notes")
    ('crb_g', 'crb_g', 'msrvtt_i2v', None)
    """
    names = {_plain(name): key for key, task in TASKS.items() for name in (key, task.name)}
    return names.get(_plain(folder))


def _plain(name):
    return "".join(filter(str.isalnum, name)).lower()


def _literal(name):
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
