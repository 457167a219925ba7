"""What must not be in training data: the benchmark's videos and texts."""

import logging
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from dataset_builders.synflow.footage import LUMA_BYTES, FootageError, frame_hashes, look_at, signature
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.texts import ngrams


# Not in the paper: how closely and for how long a benchmark video is looked at, so that a frame of a training video is
# never far from one of its frames; where the same footage is looked for, how far two clocks may drift, the share of
# frames that must be alike, and their least number.
BENCHMARK_FPS = 12.0
MAX_SECONDS = 4 * 3600.0
DRIFT_SECONDS = 0.5
ALIKE_SHARE = 0.4
LEAST_FRAMES = 4
FRAMES_AT_ONCE = 32

logger = logging.getLogger(__name__)


class BenchmarkVideo(NamedTuple):
    """A video of the benchmark.

    Attributes:
        name (`str`): `config/id`.
        signature (`np.ndarray` of shape `(128,)`): uint8, see [`signature`].
        times (`np.ndarray` of shape `(T,)`): seconds of its frames, at most `BENCHMARK_FPS` a second.
        hashes (`np.ndarray` of shape `(T, 16)`): their [`frame_hashes`].
    """

    name: str
    signature: np.ndarray
    times: np.ndarray
    hashes: np.ndarray


def benchmark_videos(settings, limits):
    """The [`BenchmarkVideo`]s of a UVRB repo: its corpora's and its queries', clips of those in some tasks.

    Args:
        settings (`Decontamination`): which repo.
        limits (`VideoQuality`): of a frame's size. Length is not limited by it: training videos are parts of longer
            ones. What cannot be looked at is logged.

    Raises:
        RecipeError: there is no such repo, or it is no benchmark.
    """
    limits = limits.model_copy(update={"min_seconds": 0.0, "max_seconds": MAX_SECONDS, "min_side": 1})
    videos, unread = [], Counter()
    for name in _sides(settings):
        for row in _rows(settings.benchmark, name):
            if row.get("video") is None:
                continue
            try:
                footage = look_at(row["video"]["bytes"] or row["video"]["path"], limits, BENCHMARK_FPS)
            except FootageError as error:
                unread[error.reason] += 1
                continue
            facts = signature(footage).ravel(), footage.times, frame_hashes(footage.thumbnails)
            videos.append(BenchmarkVideo(f"{name}/{row['id']}", *facts))
    if unread:
        logger.warning("%s: %s of the benchmark are not compared with", settings.benchmark, dict(unread))
    return videos


@lru_cache(maxsize=2)
def benchmark_texts(settings):
    """All word sequences of the benchmark's texts, queries and corpora.

    Raises:
        RecipeError: there is no such repo, or it is no benchmark.
    """
    texts = set()
    for name in _sides(settings):
        for row in _rows(settings.benchmark, name, video=False):
            texts |= ngrams(row.get("text") or "", settings.ngram)
    return frozenset(texts)


def _sides(settings):
    try:
        names = datasets.get_dataset_config_names(settings.benchmark)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:160]
        raise RecipeError(f"decontamination.benchmark: no dataset {settings.benchmark} ({problem})") from error
    sides = [name for name in names if name.endswith(("-queries", "-corpus"))]
    if not sides:
        raise RecipeError(
            f"decontamination.benchmark: {settings.benchmark} has no <key>-queries and <key>-corpus, as UVRB has"
        )
    return sides


def _rows(repo, name, video=True):
    # A folder is streamed: datasets' cache of one goes by its name and README, and would serve rows of an older one.
    table = datasets.load_dataset(repo, name, split="test", streaming=Path(repo).is_dir())
    columns = ("id", "video") if video else ("text",)
    table = table.select_columns([column for column in columns if column in table.column_names])
    return table.cast_column("video", datasets.Video(decode=False)) if "video" in table.column_names else table


def text_overlap(text, benchmark_ngrams, n):
    """Share of the text's `n`-word sequences that occur in the benchmark, 0 to 1."""
    own = ngrams(text, n)
    return len(own & benchmark_ngrams) / len(own) if own else 0.0


class BenchmarkFootage:
    """Tells which videos share footage with the benchmark: frames alike at one and the same distance in time.

    Frames are found by bands: each 64 bits of luma are cut into 4 of 16 bits, and only frames that share one are
    compared; up to 3 different bits leave one of the 4 untouched for certain. Then each pair of frames alike votes for
    the difference of their times, and a difference counts whose votes cover enough of what the two videos have in
    common under it.

    Args:
        videos (list of [`BenchmarkVideo`]): all of them.
        settings (`Decontamination`): how far frames may differ, how many seconds must be shared.
    """

    def __init__(self, videos, settings):
        self._videos, self._settings = videos, settings
        self._hashes = np.concatenate([np.empty((0, 16), np.uint8), *(video.hashes for video in videos)])
        self._times = np.concatenate([[], *(video.times for video in videos)])
        self._owners = np.repeat(np.arange(len(videos)), [len(video.times) for video in videos])
        self._bands = []
        for band in _bands(self._hashes).T:
            order = np.argsort(band, kind="stable")
            self._bands.append((order, np.searchsorted(band[order], np.arange(2**16 + 1))))

    def find(self, times, hashes):
        """Seconds shared and the name of the benchmark's video that shares most, or None.

        Args:
            times (`np.ndarray` of shape `(T,)`): seconds of a video's frames.
            hashes (`np.ndarray` of shape `(T, 16)`): their [`frame_hashes`].
        """
        own, theirs = self._alike(hashes)
        owners, shifts = self._owners[theirs], self._times[theirs] - times[own]
        best = None
        for owner in np.flatnonzero(np.bincount(owners, minlength=1) >= LEAST_FRAMES):
            mine = owners == owner
            seconds = self._shared_seconds(times, self._videos[owner].times, own[mine], shifts[mine])
            if seconds is not None and (best is None or seconds > best[0]):
                best = seconds, self._videos[owner].name
        return best

    def _alike(self, hashes):
        """Places of this video's frames and of the benchmark's that look the same."""
        own, theirs = [], []
        for first in range(0, len(hashes), FRAMES_AT_ONCE):
            some = hashes[first : first + FRAMES_AT_ONCE]
            pairs = [np.empty((0, 2), int)]
            for (order, starts), band in zip(self._bands, _bands(some).T):
                # A band of nothing is shared by all pictures without that frequency: it tells nothing.
                for place in np.flatnonzero(band):
                    found = order[starts[band[place]] : starts[int(band[place]) + 1]]
                    pairs.append(np.stack([np.full(len(found), place), found], axis=1))
            a, b = np.unique(np.concatenate(pairs), axis=0).T
            differ = np.bitwise_count(some[a] ^ self._hashes[b])
            alike = differ.sum(axis=1) <= self._settings.max_frame_bits
            alike &= differ[:, :LUMA_BYTES].sum(axis=1) <= self._settings.max_frame_luma_bits
            own.append(a[alike] + first)
            theirs.append(b[alike])
        return np.concatenate([np.empty(0, int), *own]), np.concatenate([np.empty(0, int), *theirs])

    def _shared_seconds(self, times, others, own, shifts):
        """How long two videos have the same footage, or None if too short to count."""
        needed = min(self._settings.min_shared_seconds, 0.75 * min(times[-1] - times[0], others[-1] - others[0]))
        best = None
        for shift in np.unique(shifts.round(1)):
            votes = len(np.unique(own[np.abs(shifts - shift) <= DRIFT_SECONDS]))
            common = (times + shift >= others[0] - 1e-6) & (times + shift <= others[-1] + 1e-6)
            seconds = min(times[-1] + shift, others[-1]) - max(times[0] + shift, others[0])
            if votes >= max(LEAST_FRAMES, ALIKE_SHARE * common.sum()) and seconds >= max(needed, best or 0.0):
                best = float(seconds)
        return best


def _bands(hashes):
    """`(T, 4)` uint16: the luma of each frame's hash."""
    return np.ascontiguousarray(hashes[:, :LUMA_BYTES]).view(np.uint16)
