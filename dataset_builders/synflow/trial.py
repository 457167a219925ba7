"""A sample of a recipe's videos on its way through quality control and cutting, timed for the plan.

Two tasks on one machine share its caches, memory and clock, so each is slower than one alone. So as many processes as
will run at once are timed at the same time, each on a part of the sample.
"""

import copy
import os
import threading
import time
from concurrent.futures import wait
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from dataset_builders.synflow import graph
from dataset_builders.synflow.answers import read_answer
from dataset_builders.synflow.captioning import Request
from dataset_builders.synflow.card import Card
from dataset_builders.synflow.documents import PartReader, exclusions
from dataset_builders.synflow.engine import CONTEXT, Stage, make_executor, open_pool
from dataset_builders.synflow.publish import features, write_parquet
from dataset_builders.synflow.quality import Cutter, Selection, SimilarityFilter, TextFilter, VideoFilter
from dataset_builders.synflow.sources import film_of, list_videos, sample_videos


class Timing(NamedTuple):
    """Seconds of one process: `load` before its first video, `each` for a video."""

    load: float
    each: float


class Trial(NamedTuple):
    """What a sample tells.

    Attributes:
        seen (`int`): videos that were looked at.
        kept (list of `Document`): those that passed quality control.
        timings (`dict`): [`Timing`] by step.
        first_start, start (`float`): seconds before the work of the first stage begins, and of each after it.
        sizes (`dict`): mean bytes by kind of medium.
    """

    seen: int
    kept: list
    timings: dict
    first_start: float
    start: float
    sizes: dict


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def try_out(recipe, folder, counts, at_once, sample):
    """Time the steps on `sample` videos a process.

    Args:
        recipe (`Recipe`): its captioner is not asked.
        folder (`Path`): scratch space.
        counts (`dict`): videos by source.
        at_once (`int`): processes that are timed at the same time.
        sample (`int`): videos that each of them is timed on.

    Returns:
        `Trial`: without anything but `seen` where no video is kept.
    """
    documents = sample_videos(recipe, folder, counts, at_once * (sample + 1))
    timings, kept = {"index": _time_index(recipe, folder, len(documents))}, documents
    first_start, start = _time_start(recipe, folder, at_once), _time_start(recipe, folder, at_once)
    for step in (inspect, select, cut_still, cut_clip, ask, publish):
        timings[step.__name__], kept = _together(step, recipe, folder, kept, 1 if step is select else at_once)
        if not kept:
            return Trial(len(documents), [], {}, 0.0, 0.0, {})
    timings["draw_card"] = _time_card(recipe, folder)
    sizes = {
        kind: sum(Path(document.metadata[name]).stat().st_size for document in kept) / len(kept)
        for kind, name in {"picture": "still", "clip": "clip", "video": "file"}.items()
    }
    return Trial(len(documents), kept, timings, first_start, start, sizes)


def _time_index(recipe, folder, number):
    """Of listing the first videos, which all sources do at the run's beginning."""
    started = time.perf_counter()
    listed = sum(1 for _ in islice(list_videos(recipe, folder / "list"), number))
    return Timing(0.0, (time.perf_counter() - started) / listed)


def _time_card(recipe, folder):
    """Of importing what draws the card's plots, and of drawing them."""
    started = time.perf_counter()
    Card(recipe, folder, folder).plot([10], [10.0], [])
    return Timing(time.perf_counter() - started, 0.0)


def _time_start(recipe, folder, at_once):
    """Seconds of a stage that has nothing to do."""
    empty = Stage("start", [PartReader(folder / "nothing")])
    executor = make_executor("local", empty, recipe, folder / f"{time.monotonic_ns()}", at_once, at_once)
    started = time.perf_counter()
    executor.run()
    return time.perf_counter() - started


def _together(step, recipe, folder, documents, at_once):
    """A step by `at_once` processes at the same time: its [`Timing`], and what it yields."""
    shares = [share for share in (documents[k::at_once] for k in range(at_once)) if share]
    if len(shares) == 1:
        results = [_time_share(step, recipe, folder, shares[0])]
    else:
        with open_pool(len(shares), _meet, CONTEXT.Barrier(len(shares)), CONTEXT.Value("i", 0)) as pool:
            waiting = [pool.submit(_time_share, step, recipe, folder, share) for share in shares]
            wait(waiting)
        errors = [done.exception() for done in waiting if done.exception() is not None]
        if errors:  # the others waited for the one that failed
            raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        results = [done.result() for done in waiting]
    timed = sum(number for *_, number in results)
    each = sum(timing.each * number for timing, _, number in results) / timed
    kept = [document for _, documents, _ in results for document in documents]
    return Timing(max(timing.load for timing, _, _ in results), each), kept


_others = None  # of a process that is timed beside others: where all meet when they are loaded, how many have finished


def _meet(barrier, finished):
    global _others
    _others = barrier, finished


def _time_share(step, recipe, folder, documents):
    """A process's [`Timing`], what it yields, and how many videos were timed.

    What is loaded once, whatever the number of videos, is loaded by the first, which is not timed.
    """
    first, timed = documents[:1], documents[1:] or copy.deepcopy(documents)
    try:
        started = time.perf_counter()
        kept = list(step(recipe, folder, first))
        loaded = time.perf_counter() - started
        if _others is not None:
            _others[0].wait()
        started = time.perf_counter()
        rest = list(step(recipe, folder, timed))
        each = (time.perf_counter() - started) / len(timed)
        if _others is not None:
            _keep_busy(step, recipe, folder, timed)
    except BaseException:
        if _others is not None:
            _others[0].abort()
            _others[1].value = _others[0].parties
        raise
    return Timing(max(0.0, loaded - each), each), kept + rest if len(documents) > 1 else rest, len(timed)


def _keep_busy(step, recipe, folder, documents):
    """Do it again until the last of the others has finished: alone, that one would be faster than in the run."""
    barrier, finished = _others
    with finished.get_lock():
        finished.value += 1
    again = cycle(documents)
    while finished.value < barrier.parties:
        list(step(recipe, folder, [copy.deepcopy(next(again))]))


def inspect(recipe, folder, documents):
    steps = [TextFilter(recipe, exclusions(folder, "text")), VideoFilter(recipe, folder, exclusions(folder, "video"))]
    if recipe.quality.similarity is not None:
        steps.append(SimilarityFilter(recipe, exclusions(folder, "similarity")))
    for each in steps:
        documents = each.run(documents)
    return documents


def select(recipe, folder, documents):
    """Without decontamination: the benchmark may have to be downloaded, and a plan downloads nothing."""
    alone = recipe.model_copy(update={"decontamination": None})
    return Selection(alone, exclusions(folder, "selection")).run(documents)


def cut_still(recipe, folder, documents):
    yield from _cut(recipe, folder, documents, "still", "frames", {"stills": 1, "cuts": 0})


def cut_clip(recipe, folder, documents):
    yield from _cut(recipe, folder, documents, "clip", "clips", {"stills": 0, "cuts": 1})


def _cut(recipe, folder, documents, name, found, counts):
    for document in documents:
        document.metadata.update(counts)
    for document in Cutter(recipe, folder).run(documents):
        document.metadata[name] = document.metadata[found][0]["file"]
        yield document


def ask(recipe, folder, documents):
    """What this machine has to do for a request: the answer itself where the graph gives it, else the pictures."""
    for document in documents:
        request = Request(recipe, "video_captions", document)
        if recipe.captioner.kind == "graph":
            read_answer(request.task, graph.answer(request.task, film_of(recipe, document), profile=request.profile))
        else:
            request.media(recipe.captioner)
        yield document


def publish(recipe, folder, documents):
    """A row a video."""
    columns = features("embedded")
    empty = {**dict.fromkeys(columns), "negatives": []}
    videos = (Path(document.metadata["file"]) for document in documents)
    rows = ({**empty, "target_video": {"bytes": file.read_bytes(), "path": None}} for file in videos)
    write_parquet(folder / "sample" / f"{os.getpid()}-{len(documents)}", rows, columns)
    return documents
