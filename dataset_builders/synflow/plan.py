"""What a recipe will take, before it runs: videos, requests, tokens, money, bytes and hours.

A sample of the videos goes through quality control and cutting, timed beside as many tasks as will run at once
(`trial.py`); the captioner is not asked. What is done with captions is timed on captions of the same lengths, read
from scene graphs.
"""

import heapq
import math
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

from datatrove.data import Document

from dataset_builders.synflow import graph
from dataset_builders.synflow.answers import FRAME_STYLES, VIDEO_STYLES, read_answer
from dataset_builders.synflow.pairing import Allotment, Neighbours, scaled_budgets
from dataset_builders.synflow.prompts import write_prompt
from dataset_builders.synflow.recipe import FORMATS, RecipeError
from dataset_builders.synflow.rendered import draw_film
from dataset_builders.synflow.sources import count_videos
from dataset_builders.synflow.texts import count_words
from dataset_builders.synflow.trial import cores, try_out


TIMED_TEXTS = 50
STAGES = ("inspect", "select", "cut", "caption", "relate", "compose", "pair", "publish", "card")
TOKENS_PER_WORD = 1.35  # Not in the paper: of English in the usual vocabularies
STILL_TASKS, CLIP_TASKS = ("t2i", "i2v", "ti2v"), ("tv2v", "v2v")  # which share a video's stills, and its clips
MEDIA = {  # by format: pictures, clips and videos of a row, negatives included
    "t2t": (0, 0, 0),
    "t2i": (1, 0, 0),
    "t2v": (0, 0, 2),
    "ti2v": (1, 0, 2),
    "tv2v": (0, 1, 2),
    "i2v": (1, 0, 1),
    "v2v": (0, 1, 1),
}


class Plan(NamedTuple):
    """A forecast.

    Attributes:
        videos, kept (`int`): in the sources, and after quality control.
        pairs (`dict`): by format.
        requests (`dict`): by task.
        input_tokens, output_tokens (`int`): of all requests, if each is answered rightly at once.
        dollars (`float`): at the recipe's prices.
        work_gigabytes, output_gigabytes (`float`): on disk.
        seconds (`dict`): by stage, of wall time.
        left_out (`str`, *optional*): what takes time too, and cannot be told beforehand.
    """

    videos: int
    kept: int
    pairs: dict
    requests: dict
    input_tokens: int
    output_tokens: int
    dollars: float
    work_gigabytes: float
    output_gigabytes: float
    seconds: dict
    left_out: str | None

    def __str__(self):
        pairs = ", ".join(f"{task} {number:,}" for task, number in self.pairs.items())
        requests = ", ".join(f"{task} {number:,}" for task, number in self.requests.items())
        stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.seconds.items())
        left_out = [f"not in it {self.left_out}"] if self.left_out else []
        return "\n".join(
            [
                f"videos    {self.videos:,}, of which about {self.kept:,} pass quality control",
                f"pairs     {sum(self.pairs.values()):,} ({pairs})",
                f"requests  {sum(self.requests.values()):,} ({requests})",
                f"tokens    {self.input_tokens:,} in, {self.output_tokens:,} out; {self.dollars:,.2f} dollars",
                f"disk      {self.work_gigabytes:.2f} GB of work, {self.output_gigabytes:.2f} GB of data",
                f"hours     {sum(self.seconds.values()) / 3600:.3g} ({stages})",
                *left_out,
            ]
        )


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def forecast(recipe, tasks=1, sample=24, executor="local"):
    """The plan of a recipe.

    Args:
        recipe (`Recipe`): it is not run.
        tasks (`int`): parts that will run at once.
        sample (`int`): videos that each process looks at.
        executor (`str`): "local", or "slurm" or "ray", whose tasks are taken to run as fast as one alone runs here.

    Raises:
        RecipeError: a streamed source has no limit, nothing of the sample is kept, or the pairs are not synthesised.
    """
    if recipe.pairs != "synthesised":
        raise RecipeError(f"a plan is of the whole flow, and pairs: {recipe.pairs} leaves out most of it")
    counts = count_videos(recipe)
    if None in counts.values():
        endless = [source for source, number in counts.items() if number is None]
        raise RecipeError(f"source {endless[0]}: is streamed; give it a limit to plan with")
    videos = sum(counts.values())
    if not videos:
        raise RecipeError("the sources hold no videos")
    tasks = min(tasks, math.ceil(videos / recipe.part_size))
    at_once = min(tasks, cores()) if executor == "local" else 1
    with tempfile.TemporaryDirectory() as folder:
        seen, kept, timings, first_start, start, sizes = try_out(recipe, Path(folder), counts, at_once, sample)
    if not kept:
        raise RecipeError(f"none of {seen} sampled videos passes quality control: see the thresholds")
    share = len(kept) / seen
    allotment = Allotment(recipe)
    supply = {t: int(videos * share * sum(allotment._most(d, t) for d in kept) / len(kept)) for t in FORMATS}
    pairs = scaled_budgets(recipe, supply)
    asked = {task: round(pairs.get(task, 0) * (1 + recipe.reserve)) for task in ("t2i", "ti2v", "tv2v")}
    turns = max(1, math.ceil(pairs.get("t2v", 0) * (1 + recipe.reserve) / (videos * share) / len(VIDEO_STYLES)))
    requests = {
        "video_captions": round(videos * share * min(turns, recipe.caption_rounds)),
        "frame_captions": asked["t2i"],
        "frame_query": asked["ti2v"],
        "clip_query": asked["tv2v"],
    }
    tokens_in, tokens_out = _tokens(recipe, requests)
    captioner = recipe.captioner
    picture, clip, video = sizes["picture"], sizes["clip"], sizes["video"]
    stills, cuts = _media_a_video(recipe, pairs, videos * share)
    rows = {t: n * sum(a * b for a, b in zip(MEDIA[t], (picture, clip, video))) for t, n in pairs.items()}
    cut_bytes = stills * picture + cuts * clip
    work = videos * share * (video * any(s.kind != "files" for s in recipe.sources) + cut_bytes)
    if recipe.output.media == "referenced":
        rows = {"all": videos * share * (video + cut_bytes)}
    texts, benchmark = _time_texts(recipe, round(videos * share)), recipe.decontamination
    composed = pairs.get("ti2v", 0) + pairs.get("tv2v", 0)
    # What the busiest of the tasks does takes as long as the stage.
    lanes = at_once if executor == "local" else tasks
    busiest = _busiest(videos, recipe.part_size, lanes) / videos

    def by_part(step, number):
        return timings[step].load + timings[step].each * number * busiest

    def alone(step, number):
        return timings[step].load + timings[step].each * number

    captions = requests["video_captions"] + requests["frame_captions"]
    queries = requests["frame_query"] + requests["clip_query"]
    wall = {
        "inspect": first_start - start + by_part("inspect", videos),
        "select": alone("select", videos * share),
        "cut": by_part("cut_still", stills * videos * share) + by_part("cut_clip", cuts * videos * share),
        "caption": by_part("ask", captions),
        "compose": by_part("ask", queries),
        "relate": texts["fit"] + texts["near"] * videos * share,
        "pair": texts["fit"] + texts["score"] * pairs.get("t2v", 0) + texts["rank"] * composed,
        "publish": by_part("publish", sum(rows.values()) / video),
        "card": timings["draw_card"].load,
    }
    if captioner.kind == "endpoint":
        for stage, number in {"caption": captions, "compose": queries}.items():
            wall[stage] = max(wall[stage], _answered_in(captioner, number))
    return Plan(
        videos=videos,
        kept=round(videos * share),
        pairs=pairs,
        requests=requests,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        dollars=captioner.dollars(tokens_in, tokens_out),
        work_gigabytes=work / 1e9,
        output_gigabytes=sum(rows.values()) / 1e9,
        seconds={"index": alone("index", videos), **{stage: start + wall[stage] for stage in STAGES}},
        left_out=benchmark and f"reading {benchmark.benchmark} for decontamination, once in select and once in pair",
    )


def _busiest(videos, part_size, tasks):
    """Videos of the task that gets most: whoever is free takes the next part."""
    loads = [0] * tasks
    for first in range(0, videos, part_size):
        heapq.heapreplace(loads, loads[0] + min(part_size, videos - first))
    return max(loads)


def _answered_in(captioner, requests):
    """Seconds that the captioner takes for so many requests."""
    seconds = requests * captioner.seconds_per_request / captioner.concurrency
    return max(seconds, requests * 60 / captioner.requests_per_minute if captioner.requests_per_minute else 0.0)


def _media_a_video(recipe, pairs, kept):
    """Stills and clips that are cut from a video, on average."""
    asked = {task: number * (1 + recipe.reserve) / kept for task, number in pairs.items()}
    return tuple(_mean_most([asked.get(task, 0.0) for task in tasks]) for tasks in (STILL_TASKS, CLIP_TASKS))


def _mean_most(rates):
    """Mean over videos of the most that any task asks of one, if each gives its pairs to videos drawn by itself.

    A task that asks 1.3 of a video on average asks 2 of three in ten and 1 of all others.
    """
    choices = [((math.floor(rate), 1 - rate % 1), (math.floor(rate) + 1, rate % 1)) for rate in rates]
    return sum(
        max(number for number, _ in drawn) * math.prod(share for _, share in drawn) for drawn in product(*choices)
    )


def _time_texts(recipe, kept):
    """Seconds of what is done with captions, on films of the rendered world whatever the sources.

    Returns:
        `dict`: `fit`, the vectors of all pools; `near`, the neighbours of a video; `score`, a caption beside its
        neighbours'; `rank`, a composed query among its pool.
    """
    settings = recipe.composition
    number = max(2, min(settings.pool, kept))
    answers = [
        read_answer("video_captions", graph.answer("video_captions", draw_film(recipe.seed, k))) for k in range(number)
    ]
    facts = [{"group": str(k), "split": "train", "answers": []} for k in range(number)]
    for k, said in enumerate(answers):
        facts[k]["answers"] = [{"task": "video_captions", "answer": said}]
    documents = [Document(text=" ", id=str(k), metadata=each) for k, each in enumerate(facts)]
    started = time.perf_counter()
    neighbours = Neighbours(documents, settings.pool)
    seconds = {"fit": (time.perf_counter() - started) * kept / number}
    some = list(zip(documents[:TIMED_TEXTS], answers))
    near = [("near", lambda document, said: neighbours.near(document, settings))]
    near.append(("score", lambda document, said: neighbours.member_scores(list(said.values()), document, ["0", "1"])))
    near.append(("rank", lambda document, said: neighbours.text_scores(said["1"], document)))
    for name, step in near:
        started = time.perf_counter()
        for document, said in some:
            step(document, said)
        seconds[name] = (time.perf_counter() - started) / len(some)
    seconds["score"] /= len(VIDEO_STYLES)
    return seconds


def _tokens(recipe, requests):
    captioner = recipe.captioner
    pictures = {
        "video_captions": captioner.frames,
        "frame_captions": 1,
        "frame_query": 1 + captioner.frames,
        "clip_query": 2 * captioner.frames,
    }
    styles = {"video_captions": VIDEO_STYLES, "frame_captions": FRAME_STYLES}
    tokens_in = tokens_out = 0.0
    for task, number in requests.items():
        words = count_words(write_prompt(task, recipe.seed, "plan", captioner, "other", "a caption of ten words"))
        tokens_in += number * (words * TOKENS_PER_WORD + pictures[task] * captioner.tokens_per_frame)
        said = sum((style.least + style.most) / 2 for style in styles[task]) if task in styles else 20
        tokens_out += number * said * TOKENS_PER_WORD
    return round(tokens_in), round(tokens_out)
