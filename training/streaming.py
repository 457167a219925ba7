"""Training pairs that do not fit into memory or on disk: read window by window, in an order that resumes exactly.

A pass shuffles the row groups of a task's Parquet files, fills windows of some thousand pairs with them in that
order, and shuffles the pairs inside a window. So the data order is a function of the seed and the files, and a cursor
of three numbers says where it stands. A window's pairs and decoded frames lie in a folder that exists whole or not at
all; one process of a machine makes it, all read it, and it goes when the stream has moved on.
"""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import datasets
import fsspec
import numpy as np
from filelock import FileLock
from pyarrow import parquet

from dataset_builders.referenced_media import fill_media
from training.curriculum import probe_sample
from training.pairs import (
    COLUMNS,
    ROWS_AT_ONCE,
    Drawn,
    FrameStore,
    Pair,
    Side,
    Skipped,
    choose_negatives,
    delete_folder,
    plan_batches,
    read_chunk,
    too_few_pairs,
)


WINDOWS_KEPT = 2  # of a task on a machine: a loader's worker may still want the last one


class StreamedPairs:
    """Endless batches of one task from sharded files; the counterpart of [`PairStream`].

    Args:
        repo, task, split (`str`): a pairs repo of Parquet files: folder or Hub name, config, split.
        batch_size, hard_negatives, seed, distinct, rank, world_size: see [`PairStream`].
        root (`str` or `os.PathLike`): where windows are kept; shared by the processes of a machine.
        processor (`GVEProcessor`): its frame size is the windows'.
        window_pairs (`int`): a window takes row groups until it has at least so many rows.
        max_pairs (`int`, *optional*): use the first so many rows only.

    Raises:
        ValueError: files or columns are missing, or not one batch can be made.
    """

    def __init__(
        self,
        repo,
        task,
        split,
        batch_size,
        hard_negatives,
        seed,
        root,
        processor,
        window_pairs,
        max_pairs=None,
        distinct=True,
        rank=0,
        world_size=1,
    ):
        self.task, self.batch_size, self.hard_negatives = task, batch_size, hard_negatives
        self._repo, self._root, self._processor = repo, Path(root), processor
        self._seed, self._distinct, self._rank, self._total = seed, distinct, rank, batch_size * world_size
        self._window_pairs = window_pairs
        self._groups = row_groups(repo, task, split, max_pairs)
        self._start = {"pass": 0, "window": 0, "first": 0}
        self.mined, self.mined_store = {}, None  # by row, in place of the row's own negatives: see [`MinedRows`]
        self._go_to(self._start)

    def __len__(self):
        return sum(rows for *_, rows in self._groups)

    def digest(self):
        """Bytes that tell the files apart, by name and size in rows."""
        return hashlib.sha256(json.dumps(self._groups).encode()).digest()

    def probe_pairs(self, count, seed):
        """Pairs that the prober scores, the same at every call: a sample of the first pass's first window."""
        _, pairs, store = self.window(0)
        return [pairs[row] for row in probe_sample(self.task, len(pairs), count, seed)], store

    def window_names(self):
        """Names of the first pass's windows, which hold every pair once; each tells its content."""
        return [self._name(groups) for groups in self._windows(0)]

    def window(self, number):
        """A window of the first pass: rows of its pairs in the task, list of [`Pair`], store of their media."""
        return self._open(0, number)

    def seek(self, cursor):
        """Go on from the cursor of a drawn batch; batches before its window cost a new start."""
        self._start = cursor
        self._go_to(cursor)

    def draw(self, index):
        """This rank's part of batch `index`: [`Drawn`]."""
        if index < self._cursor["first"]:
            self._go_to(self._start if index >= self._start["first"] else {"pass": 0, "window": 0, "first": 0})
        if self._batches is None:
            self._read_window()
        empty = 0
        while index >= self._cursor["first"] + len(self._batches):
            empty = 0 if self._batches else empty + 1
            if empty > len(self._windows(self._cursor["pass"])):
                raise too_few_pairs(self.task, len(self), self._total, self._distinct)
            self._go_to(self._next_window())
            self._read_window()
        rows = self._batches[index - self._cursor["first"]]
        mine = rows[self._rank * self.batch_size : (self._rank + 1) * self.batch_size]
        pairs = [self._pairs[row] for row in mine]
        found = [self.mined.get(self._rows[row], pair.negatives) for row, pair in zip(mine, pairs)]
        negatives = [choose_negatives(sides, self.hard_negatives, self._cursor["pass"]) for sides in found]
        store = self._store if self.mined_store is None else _Stores(self._store, self.mined_store)
        return Drawn(pairs, negatives, store, dict(self._cursor))

    def _go_to(self, cursor):
        self._cursor, self._batches = dict(cursor), None

    def _next_window(self):
        number_of_pass, window = self._cursor["pass"], self._cursor["window"] + 1
        if window == len(self._windows(number_of_pass)):
            number_of_pass, window = number_of_pass + 1, 0
        return {"pass": number_of_pass, "window": window, "first": self._cursor["first"] + len(self._batches)}

    def _read_window(self):
        number_of_pass, window = self._cursor["pass"], self._cursor["window"]
        self._rows, self._pairs, self._store = self._open(number_of_pass, window)
        order = self._generator(number_of_pass, window).permutation(len(self._pairs)).tolist()
        self._batches = plan_batches(self._pairs, order, self._total, self._distinct)

    def _generator(self, *numbers):
        return np.random.default_rng([self._seed, zlib.crc32(self.task.encode()), *numbers])

    def _windows(self, number_of_pass):
        """Row groups of each window of a pass."""
        windows = [[]]
        for place in self._generator(number_of_pass).permutation(len(self._groups)):
            if sum(rows for *_, rows in windows[-1]) >= self._window_pairs:
                windows.append([])
            windows[-1].append(self._groups[place])
        return windows

    def _name(self, groups):
        return f"{self.task}-{hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]}"

    def _open(self, number_of_pass, window):
        """Rows and pairs of a window, and the store of their media; made if they are not there."""
        groups = self._windows(number_of_pass)[window]
        name = self._name(groups)
        folder = self._root / name
        self._root.mkdir(parents=True, exist_ok=True)
        with FileLock(self._root / f".{self.task}.lock"):
            if not folder.is_dir():
                self._make_window(groups, folder)
            pairs = [_pair(record) for record in json.loads((folder / "pairs.json").read_text())]
            store = FrameStore(folder, self._processor)  # maps its files now, so they may be deleted later
            self._delete_old_windows(folder)
        skipped = [Skipped(*each) for each in json.loads(self._report(name).read_text())]
        left_out = {each.row for each in skipped if each.side in ("query", "target")}
        rows = [row for *_, first, count in groups for row in range(first, first + count) if row not in left_out]
        return rows, pairs, store

    def _delete_old_windows(self, opened):
        """Keep those that were opened last, by whichever process: workers and killed runs leave theirs behind."""
        os.utime(opened)
        windows = [path for path in self._root.iterdir() if path.name.rpartition("-")[0] == self.task]
        for old in sorted(windows, key=lambda path: path.stat().st_mtime_ns)[:-WINDOWS_KEPT]:
            delete_folder(old)

    def _report(self, name):
        """Where it says what a window had to leave out; it stays when the window goes."""
        return self._root / "skipped" / f"{name}.json"

    def _make_window(self, groups, folder):
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        store, pairs, skipped = FrameStore(temporary, self._processor), [], []
        for path, group, first, rows in groups:
            with fsspec.open(path, "rb") as file:
                table = parquet.ParquetFile(file).read_row_group(group, columns=list(COLUMNS)).slice(0, rows)
            for start in range(0, rows, ROWS_AT_ONCE):
                chunk = fill_media(self._repo, table.slice(start, ROWS_AT_ONCE).to_pylist())
                read_chunk(self.task, first + start, chunk, store, pairs, skipped)
        store.seal()
        (temporary / "pairs.json").write_text(json.dumps(pairs))
        self._report(folder.name).parent.mkdir(exist_ok=True)
        self._report(folder.name).write_text(json.dumps(skipped))
        temporary.rename(folder)


class _Stores:
    """Media of a window and of the corpus that negatives were mined from."""

    def __init__(self, *stores):
        self._stores = stores

    def __getitem__(self, key):
        return next(store for store in self._stores if key in store)[key]


def row_groups(repo, task, split, max_pairs=None):
    """Row groups of a task's Parquet files, in file order.

    Returns:
        list of `[path, group, first, rows]`: path as fsspec opens it, number in the file, number of its first row in
        the task, rows to use.

    Raises:
        ValueError: the repo, config or split does not exist, or its files are not Parquet or lack columns.
    """
    try:
        files = datasets.load_dataset_builder(repo, task).config.data_files[split]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read split {split!r} of task {task!r} from {repo!r}: {error}") from error
    groups, first = [], 0
    for path in files:
        if not path.endswith(".parquet"):
            raise ValueError(f"streaming reads Parquet files only, task {task!r} has {path}: set streaming to false")
        with fsspec.open(path, "rb") as file:
            metadata = parquet.ParquetFile(file).metadata
        missing = set(COLUMNS) - set(metadata.schema.to_arrow_schema().names)
        if missing:
            raise ValueError(f"task {task!r} of {repo!r} lacks the columns {', '.join(sorted(missing))}")
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if max_pairs is not None:
                rows = min(rows, max_pairs - first)
            if rows > 0:
                groups.append([str(path), group, first, rows])
                first += rows
    if not groups:
        raise ValueError(f"task {task!r} of {repo!r} has no pair in split {split!r}")
    return groups


def skipped_sides(root):
    """What windows had to leave out: list of `(task, row, side, reason)`, each once."""
    records = {tuple(each) for path in Path(root).glob("skipped/*.json") for each in json.loads(path.read_text())}
    return sorted(records)


def _pair(record):
    query, target, negatives, instruction, source_id = record
    return Pair(Side(*query), Side(*target), tuple(Side(*each) for each in negatives), instruction, source_id)
