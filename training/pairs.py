"""Training pairs: read once, media decoded once, batched without duplicates.

A pairs repo has one config a task with the columns of `COLUMNS` (see the project's conventions). Its videos and images
are decoded into a [`FrameStore`] at the model's frame size before training, so that a step only copies pixels.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from tqdm import tqdm

from dataset_builders.referenced_media import fill_media
from modeling_gve.video_gve import VideoFrames, decode_video, load_image
from training.curriculum import probe_sample


SIDES = tuple(f"{side}_{kind}" for side in ("query", "target") for kind in ("text", "image", "video"))
COLUMNS = (*SIDES, "negatives", "instruction", "source_id")
ROWS_AT_ONCE = 256
# Checkpoints, segments of frames and features, windows of a stream, embeddings and mined places, not renamed yet.
UNFINISHED = re.compile(r"\.(checkpoint-\d{8}|[0-9a-f]{12}(\.tmp)?|.+-[0-9a-f]{16}(\.tmp)?|[0-9a-f]{32}\.tmp)")


def available_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Side(NamedTuple):
    """One side of a pair: text and keys of media in the [`FrameStore`]. Equal sides have equal content."""

    text: str | None = None
    image: str | None = None
    video: str | None = None


class Pair(NamedTuple):
    """A training pair; the instruction belongs to the query only."""

    query: Side
    target: Side
    negatives: tuple
    instruction: str | None
    source_id: str | None


class Skipped(NamedTuple):
    """A pair or a negative that was left out because its content could not be read."""

    task: str
    row: int
    side: str
    reason: str


class FrameStore:
    """Frames of videos and images as uint8 at the model's size, on disk, by content.

    Files lie in `root/<settings>/<segment>/`, where `settings` names frame count and size limits. A segment is a file
    of pixels and an index; it is written under a temporary name and renamed when whole, so an interrupted run leaves
    nothing half-written, and later runs read it and decode only what is new.

    Args:
        root (`str` or `os.PathLike`): cache folder.
        processor (`GVEProcessor`): its `num_frames` and its image and video processors' sizes are the rule.
    """

    def __init__(self, root, processor):
        self._processor = processor
        self.folder = Path(root) / self._settings_name()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._entries = {}  # key -> (pixels of its segment, offset, shape, times)
        self._writer = None
        for segment in sorted(self.folder.iterdir()):
            if not segment.name.startswith("."):
                self._open(segment)

    def __contains__(self, key):
        return key in self._entries or (self._writer is not None and key in self._writer.index)

    def __len__(self):
        return len(self._entries)

    def __getitem__(self, key):
        """Frames of a sealed medium, as [`VideoFrames`] of `(T, H, W, 3)` uint8 and seconds; an image has T = 1."""
        pixels, offset, shape, times = self._entries[key]
        return VideoFrames(pixels[offset : offset + int(np.prod(shape))].reshape(shape), times)

    def put(self, media):
        """Decode media that are not stored yet.

        Args:
            media (list of `(kind, data)`): kind `"image"` or `"video"`, data the encoded file's `bytes`.

        Returns:
            list of `(key, reason)`: the key, or None and why the medium cannot be read.
        """
        keys = [f"{kind}-{hashlib.sha256(data).hexdigest()[:32]}" for kind, data in media]
        new = {key: item for key, item in zip(keys, media) if key not in self}
        failures = {}
        with ThreadPoolExecutor(available_cores()) as pool:
            for key, frames in zip(new, pool.map(self._decode, new.values())):
                if isinstance(frames, str):
                    failures[key] = frames
                else:
                    self._writer = self._writer or _SegmentWriter(self.folder)
                    self._writer.add(key, frames)
        return [(None, failures[key]) if key in failures else (key, None) for key in keys]

    def seal(self):
        """Make what was `put` since the last call durable and readable."""
        if self._writer is not None:
            segment, self._writer = self._writer.close(), None
            self._open(segment)

    def _settings_name(self):
        image, video = self._processor.image_processor, self._processor.video_processor
        rule = [self._processor.num_frames, image.patch_size * image.merge_size, video.patch_size * video.merge_size]
        rule += [image.size.shortest_edge, image.size.longest_edge, video.size.shortest_edge, video.size.longest_edge]
        return "frames-" + "-".join(str(int(number)) for number in rule)

    def _open(self, segment):
        index = json.loads((segment / "index.json").read_text())
        pixels = np.memmap(segment / "pixels.bin", dtype=np.uint8, mode="r")
        for key, (offset, shape, times) in index.items():
            self._entries[key] = (pixels, offset, tuple(shape), np.array(times))

    def _decode(self, item):
        """Frames at the model's size, or the reason why there are none."""
        kind, data = item
        try:
            if kind == "image":
                return VideoFrames(self._resize(load_image(data)[None], self._processor.image_processor), np.zeros(1))
            frames, times = decode_video(data, self._processor.num_frames)
            return VideoFrames(self._resize(frames, self._processor.video_processor), times)
        except ValueError as error:
            return str(error)

    @staticmethod
    def _resize(frames, processor):
        """The processor's own resizing, `(T, H, W, 3)` to `(T, H', W', 3)` uint8; doing it again changes nothing."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
        factor = processor.patch_size * processor.merge_size
        resized = processor.resize(pixels, size=processor.size, resample=processor.resample, factor=factor)
        return resized.movedim(-3, -1).contiguous().numpy()


class _SegmentWriter:
    """A segment of the [`FrameStore`] under its temporary name."""

    def __init__(self, folder):
        self._name = uuid.uuid4().hex[:12]
        self._temporary = folder / f".{self._name}"
        self._final = folder / self._name
        self._temporary.mkdir()
        self._file = open(self._temporary / "pixels.bin", "wb")
        self.index = {}

    def add(self, key, frames):
        self.index[key] = (self._file.tell(), frames.frames.shape, np.asarray(frames.times).tolist())
        self._file.write(frames.frames.tobytes())

    def close(self):
        self._file.close()
        (self._temporary / "index.json").write_text(json.dumps(self.index))
        os.replace(self._temporary, self._final)
        return self._final


def remove_unfinished(folder):
    """Delete what an interrupted writer left behind under temporary names: those of this project, and no others."""
    for leftover in Path(folder).glob("**/.*"):
        if not UNFINISHED.fullmatch(leftover.name):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def delete_folder(folder):
    """Delete a folder that nobody may find in part: it is renamed first, to what `remove_unfinished` takes."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def task_names(repo):
    """Configs of a pairs repo.

    Raises:
        ValueError: there is no such repo.
    """
    try:
        return datasets.get_dataset_config_names(repo)
    except (OSError, ValueError) as error:
        raise ValueError(f"no training pairs at {repo!r}: give a dataset folder or Hub name as pairs") from error


def read_pairs(repo, task, split, store, max_pairs=None, progress=False):
    """Pairs of one task, their media put into the store and not sealed yet.

    Args:
        repo (`str`): folder or Hub name.
        task, split (`str`): config and split.
        store ([`FrameStore`]): receives the media.
        max_pairs (`int`, *optional*): read at most so many rows.
        progress (`bool`, defaults to `False`): show a bar.

    Returns:
        `tuple` of the list of [`Pair`] and the list of [`Skipped`].

    Raises:
        ValueError: split or columns are missing, or no pair is usable.
    """
    try:
        # A folder is streamed: datasets' cache of a local repo goes by its name and README and would serve old rows
        # after the Parquet files have changed.
        rows = datasets.load_dataset(repo, task, split=split, streaming=Path(repo).is_dir())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read split {split!r} of task {task!r} from {repo!r}: {reason}") from error
    missing = [name for name in COLUMNS if name not in (rows.column_names or [])]
    if missing:
        raise ValueError(f"task {task!r} of {repo!r} lacks the columns {', '.join(missing)}")
    rows = rows.select_columns(list(COLUMNS))
    rows = rows if max_pairs is None else rows.take(max_pairs)
    pairs, skipped = [], []
    with tqdm(desc=f"reading {task}", unit="pair", disable=not progress, leave=False) as bar:
        # Arrow format leaves media undecoded: structs of bytes and path.
        for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
            chunk = fill_media(repo, table.to_pylist())
            read_chunk(task, bar.n, chunk, store, pairs, skipped)
            bar.update(len(chunk))
    if not pairs:
        detail = f"; the first: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"task {task!r} of {repo!r} has no usable pair in split {split!r}{detail}")
    return pairs, skipped


def read_chunk(task, first, chunk, store, pairs, skipped):
    """Append the pairs of consecutive rows, decoding their media together."""
    raw = {(number, name): side for number, row in enumerate(chunk, first) for name, side in _raw_sides(row).items()}
    reasons, encoded = {}, {}
    for place, side in raw.items():
        for kind in ("image", "video"):
            if side[kind] is not None:
                encoded[place, kind], reasons[place, kind] = _file_bytes(side[kind])
    readable = [where for where, data in encoded.items() if data is not None]
    stored = store.put([(kind, encoded[place, kind]) for place, kind in readable])
    keys = {where: key for where, (key, _) in zip(readable, stored)}
    reasons |= {where: reason for where, (_, reason) in zip(readable, stored)}

    for number, row in enumerate(chunk, first):
        sides, broken = {}, []
        for name in _raw_sides(row):
            place = (number, name)
            reason = _first_reason(raw[place], *(reasons.get((place, kind)) for kind in ("image", "video")))
            if reason:
                broken.append(Skipped(task, number, name, reason))
            else:
                sides[name] = Side(raw[place]["text"] or None, keys.get((place, "image")), keys.get((place, "video")))
        skipped += broken
        if "query" in sides and "target" in sides:
            query, target, *negatives = sides.values()
            pairs.append(Pair(query, target, tuple(negatives), row["instruction"], row["source_id"]))


def _first_reason(side, *reasons):
    """Why a side cannot be used, or None."""
    empty = not side["text"] and side["image"] is None and side["video"] is None
    return next(filter(None, reasons), "it has no text, image or video" if empty else None)


def _raw_sides(row):
    """`{name: {text, image, video}}` of a row, query and target first, media still encoded."""
    sides = {
        name: {kind: row[f"{name}_{kind}"] for kind in ("text", "image", "video")} for name in ("query", "target")
    }
    return sides | {f"negative {index}": negative for index, negative in enumerate(row["negatives"] or [])}


def _file_bytes(medium):
    """Bytes of a datasets medium and None, or None and the reason."""
    if medium["bytes"]:
        return medium["bytes"], None
    path = medium["path"]
    if not path:
        return None, "it is empty"
    try:
        return Path(path).read_bytes(), None
    except OSError as error:
        return None, f"{path}: {error.strerror}"


class Drawn(NamedTuple):
    """This rank's part of a batch.

    Attributes:
        pairs (list of [`Pair`]): B of them.
        negatives (list of list of [`Side`]): at most N for each pair.
        store ([`FrameStore`]): holds their media.
        cursor (`dict`, *optional*): where a stream that cannot be indexed goes on; plain values.
    """

    pairs: list
    negatives: list
    store: FrameStore
    cursor: dict | None = None


class PairStream:
    """Endless batches of one task; batch i is a function of the settings, the seed and i.

    Every pass over the pairs has an order of its own. A batch of all ranks together is cut into equal consecutive
    parts, so that R ranks with B queries see what one rank with R * B queries sees. Pairs that do not fill a batch at
    the end of a pass wait for a later pass's order.

    Args:
        task (`str`): for seeds and messages.
        pairs (list of [`Pair`]): the task's pairs.
        batch_size (`int`): B, queries a rank.
        hard_negatives (`int`): N, at most, a query. A row with more takes turns from pass to pass.
        seed (`int`): of the orders.
        distinct (`bool`, defaults to `True`): no source, query or target twice in the batch of all ranks.
            # Not in the paper: it masks duplicates by their scores only.
        rank, world_size (`int`): this process among all.
        store ([`FrameStore`], *optional*): holds the pairs' media.

    Raises:
        ValueError: not one batch can be made.
    """

    def __init__(self, task, pairs, batch_size, hard_negatives, seed, distinct=True, rank=0, world_size=1, store=None):
        self.task, self.pairs, self.batch_size, self.hard_negatives = task, pairs, batch_size, hard_negatives
        self.store = store
        self.mined = {}  # from place in `pairs` to sides; where a pair is listed, they replace its own negatives
        self._seed, self._distinct, self._rank, self._total = seed, distinct, rank, batch_size * world_size
        self._next_pass, self._first, self._batches = 0, 0, []

    def __len__(self):
        return len(self.pairs)

    def digest(self):
        """Bytes that tell the content of the pairs apart."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(repr(tuple(pair)).encode())
        return digest.digest()

    def probe_pairs(self, count, seed):
        """Pairs that the prober scores, the same at every call, and the store of their media."""
        return [self.pairs[row] for row in probe_sample(self.task, len(self.pairs), count, seed)], self.store

    def seek(self, cursor):
        """Go on from a cursor; this stream needs none, batches are found by their number."""

    def draw(self, index):
        """This rank's part of batch `index`, with negatives: [`Drawn`]."""
        rows, number_of_pass = self._rows(index)
        negatives = [self.negatives_of(row, number_of_pass) for row in rows]
        return Drawn([self.pairs[row] for row in rows], negatives, self.store)

    def batch(self, index):
        """This rank's part of batch `index`: `tuple` of the list of [`Pair`] and the number of the pass."""
        rows, number_of_pass = self._rows(index)
        return [self.pairs[row] for row in rows], number_of_pass

    def negatives_of(self, row, number_of_pass):
        """At most N hard negatives of a pair, mined ones before its own; another choice in each pass."""
        negatives = self.mined.get(row, self.pairs[row].negatives)
        return choose_negatives(negatives, self.hard_negatives, number_of_pass)

    def _rows(self, index):
        if index < self._first:
            self._next_pass, self._first, self._batches = 0, 0, []
        while index >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._batches = self._plan(self._next_pass)
            self._next_pass += 1
        rows = self._batches[index - self._first]
        return rows[self._rank * self.batch_size : (self._rank + 1) * self.batch_size], self._next_pass - 1

    def _plan(self, number_of_pass):
        generator = np.random.default_rng([self._seed, zlib.crc32(self.task.encode()), number_of_pass])
        order = generator.permutation(len(self.pairs)).tolist()
        batches = plan_batches(self.pairs, order, self._total, self._distinct)
        if not batches:
            raise too_few_pairs(self.task, len(self.pairs), self._total, self._distinct)
        return batches


def choose_negatives(negatives, count, number_of_pass):
    """At most `count` hard negatives; a different choice in each pass where there are more."""
    available = len(negatives)
    first = number_of_pass * count
    return [negatives[(first + offset) % available] for offset in range(min(count, available))]


def too_few_pairs(task, size, total, distinct):
    """The error of a task that cannot fill one batch."""
    kind = "distinct pairs" if distinct else "pairs"
    return ValueError(
        f"task {task!r} has {size} pairs, too few {kind} for one batch of {total} over all ranks: lower "
        f"task_batch_size of {task}"
    )


def plan_batches(pairs, order, total, distinct):
    """Rows of full batches of `total` pairs, taken in an order.

    With `distinct`, no source, query or target comes twice in a batch: a pair that clashes waits for the next one.
    """
    if not distinct:
        return [order[start : start + total] for start in range(0, len(order) - len(order) % total, total)]
    batches, waiting = [], order
    while len(waiting) >= total:
        rows, taken, deferred = [], set(), []
        for place, row in enumerate(waiting):
            pair = pairs[row]
            # The prefixes keep a source's name from equalling a side.
            names = {("query", pair.query), ("target", pair.target)}
            if pair.source_id is not None:
                names.add(("source", pair.source_id))
            if names & taken:
                deferred.append(row)
                continue
            rows.append(row)
            taken |= names
            if len(rows) == total:
                deferred += waiting[place + 1 :]
                break
        if len(rows) < total:
            break
        batches.append(rows)
        waiting = deferred
    return batches
