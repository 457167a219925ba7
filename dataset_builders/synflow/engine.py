"""Runs a recipe: stages one after the other, each a datatrove pipeline whose tasks are the parts."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import dill
import psutil
import yaml
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger
from tqdm import tqdm

from dataset_builders.synflow.captioning import Answered, CaptionRunner, caption_requests, composition_requests
from dataset_builders.synflow.card import MARKER, Card
from dataset_builders.synflow.documents import NODE, UNFINISHED, PartReader, WholeWriter, exclusions
from dataset_builders.synflow.pairing import Allotment, FoundPairs, Pairing, Relation
from dataset_builders.synflow.publish import Publisher
from dataset_builders.synflow.quality import (
    Cutter,
    Selection,
    SimilarityFilter,
    TextFilter,
    VideoFilter,
    VideoPresent,
)
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.sources import read_index, write_index
from dataset_builders.synflow.store import write_whole


logger.disable("datatrove.executor.base")  # it logs an exception and raises it too: once is enough
logger.disable("datatrove.pipeline.writers.disk_base")  # it warns of files that are not named by task

PAID = ("requests", "input_tokens", "output_tokens")
RESTARTS = 20  # of a pool whose workers were killed
CONTEXT = multiprocessing.get_context("forkserver")


class Stage(NamedTuple):
    """A pipeline, by part or over all of them."""

    name: str
    pipeline: list
    by_part: bool = True
    asks: bool = False  # of the captioner, whose limits its tasks share


class Queries(Answered):
    """Takes the composed queries in beside the captions."""

    def filter(self, document):
        captions = document.metadata.pop("captions")
        kept = super().filter(document)
        document.metadata["queries"] = document.metadata["answers"]
        document.metadata["answers"] = captions
        return kept


def set_captions_aside(data, rank=0, world_size=1):
    """The second round of requests writes to `answers` too."""
    for document in data:
        document.metadata["captions"] = document.metadata["answers"]
        yield document


def stages(recipe, work, output, store, workers=1):
    """The flow from the index to the card; raw and filtered pairs leave out the stages that they do without.

    Args:
        recipe (`Recipe`): what to make.
        work, output (`Path`): folders of the run and of the dataset.
        store (`Path`): folder of the answers.
        workers (`int`): tasks that ask the captioner at once, and share its limits.
    """

    end = [
        Stage("publish", [Publisher(recipe, work, output)]),
        Stage("card", [Card(recipe, work, output)], by_part=False),
    ]
    found = FoundPairs(recipe, work, exclusions(work, "pair"))
    found = Stage("pair", [PartReader(work / "selected", every=True), found], by_part=False)
    if recipe.pairs == "raw":
        present = VideoPresent(recipe, work, exclusions(work, "video"))
        return [Stage("find", [PartReader(work / "index"), present, WholeWriter(work / "selected")]), found, *end]
    quality = _quality_stages(recipe, work)
    if recipe.pairs == "filtered":
        return [*quality, found, *end]
    return [*quality, *_synthesis_stages(recipe, work, store, workers), *end]


def _quality_stages(recipe, work):
    inspect = [
        PartReader(work / "index"),
        TextFilter(recipe, exclusions(work, "text")),
        VideoFilter(recipe, work, exclusions(work, "video")),
    ]
    if recipe.quality.similarity is not None:
        inspect.append(SimilarityFilter(recipe, exclusions(work, "similarity")))
    select = [PartReader(work / "inspected", every=True), Selection(recipe, exclusions(work, "selection"))]
    if recipe.pairs == "synthesised":
        select.append(Allotment(recipe))
    return [
        Stage("inspect", [*inspect, WholeWriter(work / "inspected")]),
        Stage("select", [*select, WholeWriter(work / "selected", "${part}.jsonl")], by_part=False),
    ]


def _synthesis_stages(recipe, work, store, workers):
    def runner(folder, requests):
        return CaptionRunner(recipe, work, store, WholeWriter(work / folder), requests, workers)

    return [
        Stage(
            "cut",
            [PartReader(work / "selected"), Cutter(recipe, work, exclusions(work, "cut")), WholeWriter(work / "cut")],
        ),
        Stage("caption", [PartReader(work / "cut"), runner("captioned", caption_requests)], asks=True),
        Stage(
            "relate",
            [
                PartReader(work / "captioned", every=True),
                Answered(exclusions(work, "caption"), needed="video_captions"),
                Relation(recipe),
                WholeWriter(work / "related", "${part}.jsonl"),
            ],
            by_part=False,
        ),
        Stage(
            "compose",
            [PartReader(work / "related"), set_captions_aside, runner("composed", composition_requests)],
            asks=True,
        ),
        Stage(
            "pair",
            [
                PartReader(work / "composed", every=True),
                Queries(exclusions(work, "compose")),
                Pairing(recipe, work, exclusions(work, "pair")),
            ],
            by_part=False,
        ),
    ]


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on a pool that notices when a worker is killed, and begins its parts anew.

    datatrove's own waits for ever for a worker that the kernel killed.
    """

    def run(self):
        todo = self.get_incomplete_ranks()
        with tqdm(total=self.tasks, initial=self.tasks - len(todo), desc=self.stage, unit="part") as bar:
            self._paid = dict.fromkeys(PAID, 0)
            if self.workers == 1:
                pristine = dill.dumps(self)
                for rank in todo:
                    _run_part(pristine, rank)
                    self._advance(bar, rank)
                return
            for _ in range(RESTARTS):
                if self._run_in_pool(self.get_incomplete_ranks(), bar):
                    return
        raise RuntimeError(f"{self.stage}: workers were killed {RESTARTS} times; see the memory, then start again")

    def _advance(self, bar, rank):
        """Count a part, and what its answers cost."""
        bar.update()
        add_paid(self._paid, Path(self.logging_dir.resolve_paths(f"stats/{rank:05d}.json")))
        if self._paid["requests"]:
            bar.set_postfix_str(paid_line(self.captioner, self._paid))

    def _run_in_pool(self, ranks, bar):
        """Whether all parts were done."""
        with open_pool(max(1, min(self.workers, len(ranks)))) as pool:
            pristine = dill.dumps(self)
            waiting = {pool.submit(_run_part, pristine, rank): rank for rank in ranks}
            try:
                for done in as_completed(waiting):
                    done.result()
                    self._advance(bar, waiting[done])
            except BrokenProcessPool:
                logger.warning(f"{self.stage}: a worker was killed; its parts begin anew")
                return False
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return True


def open_pool(workers, prepare=None, *facts):
    """A pool that notices a killed worker; its workers begin with `prepare(*facts)` and end with this process."""
    CONTEXT.set_forkserver_preload([__name__])
    begin = {"initializer": _begin_worker, "initargs": (os.getpid(), prepare, *facts)}
    return ProcessPoolExecutor(workers, mp_context=CONTEXT, **begin)


def _begin_worker(driver, prepare, *facts):
    _leave_with(driver)
    if prepare is not None:
        prepare(*facts)


def _leave_with(driver):
    """Ends this worker soon after its driver: one that was killed cannot do it."""
    process = psutil.Process(driver)

    def watch():
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_part(pristine, rank):
    """One part by a fresh copy of the pipeline (steps keep counts). Only errors reach the terminal."""
    dill.loads(pristine)._run_for_rank(rank, local_rank=1)


def make_executor(kind, stage, recipe, work, parts, workers, depends=None):
    """datatrove's executor of a stage, its tasks being the parts."""
    common = {
        "pipeline": stage.pipeline,
        "tasks": parts if stage.by_part else 1,
        "workers": workers,
        "logging_dir": str(work / "logs" / stage.name),
    }
    if kind == "local":
        executor = LocalExecutor(**common)
        executor.stage, executor.captioner = stage.name, recipe.captioner
        return executor
    if kind == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(**common, mem_per_cpu_gb=0.25)
    from datatrove.executor import SlurmPipelineExecutor

    settings = recipe.slurm.model_dump()
    return SlurmPipelineExecutor(
        **common, **settings, job_name=f"synflow-{stage.name}", depends=depends, qos=None, requeue=True
    )


def work_folder(root, recipe):
    return Path(root).resolve() / f"{recipe.name}-{recipe.fingerprint}"


def is_complete(recipe, output):
    marker = Path(output) / MARKER
    return marker.exists() and f'"{recipe.fingerprint}"' in marker.read_text()


def run(recipe, root="build/synflow", output=None, store=None, executor="local", tasks=1, clock=None):
    """Run a recipe, or go on with it where it stopped.

    Args:
        recipe (`Recipe`): what to make.
        root (`str`): folder of runs; each recipe has one of its own in it.
        output (`str`, *optional*): folder of the dataset, default `build/hub/org/<name>`.
        store (`str`, *optional*): folder of paid answers, shared by all runs, default `<root>/answers`.
        executor (`str`): "local", "slurm" or "ray".
        tasks (`int`): parts that run at once.
        clock (`dict`, *optional*): gets the wall seconds of the index and of each stage.

    Returns:
        `Path`: the dataset's folder.
    """
    work = work_folder(root, recipe)
    output = Path(output or f"build/hub/org/{recipe.name}").resolve()
    store = Path(store or Path(root) / "answers").resolve()
    if is_complete(recipe, output):
        read_index(recipe, work)
        return output
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    _check_output(work, output)
    remove_unfinished(work)
    started = time.perf_counter()
    parts = write_index(recipe, work)
    if clock is not None:
        clock["index"] = time.perf_counter() - started
    if executor == "ray":
        import ray

        ray.init(ignore_reinit_error=True)
    tasks, before = min(tasks, parts), None
    asking = min(tasks, recipe.captioner.concurrency) if recipe.captioner else tasks
    for stage in stages(recipe, work, output, store, asking):
        at_once = asking if stage.asks else tasks
        running, started = make_executor(executor, stage, recipe, work, parts, at_once, before), time.perf_counter()
        running.run()
        if clock is not None:
            clock[stage.name] = time.perf_counter() - started
        if executor == "slurm":
            before = running
        elif left := running.get_incomplete_ranks(skip_completed=True):
            raise RuntimeError(f"{stage.name}: {len(left)} parts are not done; see {work / 'logs' / stage.name}")
    return output


def _total(number):
    """datatrove writes statistics of nothing, and of one thing, as a bare number."""
    return number.get("total", 0) if isinstance(number, dict) else number


def spent(work):
    """What the captioner was paid for in this run's answers: `{"requests", "input_tokens", "output_tokens"}`."""
    total = dict.fromkeys(PAID, 0)
    for path in Path(work).glob("logs/*/stats/*.json"):
        add_paid(total, path)
    return total


def add_paid(total, path):
    """Adds what one part's statistics say that its answers cost."""
    for step in json.loads(path.read_text()):
        for name in total:
            total[name] += _total(step["stats"].get(name, 0))


def paid_line(captioner, paid):
    dollars = captioner.dollars(paid["input_tokens"], paid["output_tokens"])
    line = "{requests:,} requests, {input_tokens:,} + {output_tokens:,} tokens".format(**paid)
    return f"{line}, {dollars:,.2f} dollars"


def parts_done(work):
    """`{stage: parts that are done}` of a run, wherever it runs."""
    stages = sorted(Path(work).glob("logs/*"), key=lambda folder: folder.stat().st_ctime)
    return {folder.name: len(list(folder.glob("completions/*"))) for folder in stages}


def step_seconds(work):
    """Seconds that each step took in this run, over all tasks: `{(stage, step): seconds}`."""
    total = {}
    for path in sorted(Path(work).glob("logs/*/stats/*.json")):
        for step in json.loads(path.read_text()):
            key = path.parts[-3], step["name"].rpartition(": ")[2]
            total[key] = total.get(key, 0.0) + _total(step["time_stats"])
    return total


def _check_output(work, output):
    """A folder is filled by one recipe: shards of another would be taken for its own.

    A dataset that was finished and then deleted is written again; only what is missing of it.

    Raises:
        RecipeError: the folder holds a dataset already.
    """
    note = work / "output.txt"
    if note.exists() and note.read_text() == str(output):
        if parts_done(work).get("card"):  # and yet the marker, which the card writes before, is not there
            for stage in ("publish", "card"):
                shutil.rmtree(work / "logs" / stage / "completions", ignore_errors=True)
        return
    if (output / "data").exists():
        raise RecipeError(f"{output}: holds a dataset of another recipe; remove it, or name another folder (--output)")
    for stage in ("publish", "card"):  # they may have written to another folder
        shutil.rmtree(work / "logs" / stage, ignore_errors=True)
    write_whole(note, str(output))


def remove_unfinished(work):
    """Delete what killed writers of this machine left; the file of one that still runs stays."""
    for leftover in Path(work).glob(f"**/*{UNFINISHED}"):
        node, _, pid = leftover.name.removesuffix(UNFINISHED).rpartition(".")[2].rpartition("+")
        if node == NODE and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)
