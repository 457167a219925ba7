"""What a recipe will take, before it runs: videos, requests, tokens, money, bytes and hours.

A sample of the videos goes through quality control and cutting, timed; the captioner is not asked. What is done with
captions is timed on captions of the same lengths, read from scene graphs.
"""

import copy
import math
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datatrove.data import Document

from dataset_builders.synflow import graph
from dataset_builders.synflow.answers import FRAME_STYLES, VIDEO_STYLES, read_answer
from dataset_builders.synflow.documents import exclusions
from dataset_builders.synflow.pairing import Allotment, Neighbours, scaled_budgets
from dataset_builders.synflow.prompts import write_prompt
from dataset_builders.synflow.publish import features, write_parquet
from dataset_builders.synflow.quality import Cutter, SimilarityFilter, TextFilter, VideoFilter
from dataset_builders.synflow.recipe import FORMATS, RecipeError
from dataset_builders.synflow.rendered import draw_film
from dataset_builders.synflow.sources import count_videos, list_videos
from dataset_builders.synflow.texts import count_words


TIMED_TEXTS = 50
STAGES = ("inspect", "select", "cut", "caption", "relate", "compose", "pair", "publish", "card")
START_SECONDS = 0.9  # Not in the paper: of a stage's processes, measured; it is most of a small run
TOKENS_PER_WORD = 1.35  # Not in the paper: of English in the usual vocabularies
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

    def __str__(self):
        pairs = ", ".join(f"{task} {number:,}" for task, number in self.pairs.items())
        requests = ", ".join(f"{task} {number:,}" for task, number in self.requests.items())
        stages = ", ".join(f"{name} {seconds / 3600:.2f}" for name, seconds in self.seconds.items())
        return "\n".join(
            [
                f"videos    {self.videos:,}, of which about {self.kept:,} pass quality control",
                f"pairs     {sum(self.pairs.values()):,} ({pairs})",
                f"requests  {sum(self.requests.values()):,} ({requests})",
                f"tokens    {self.input_tokens:,} in, {self.output_tokens:,} out; {self.dollars:,.2f} dollars",
                f"disk      {self.work_gigabytes:.2f} GB of work, {self.output_gigabytes:.2f} GB of data",
                f"hours     {sum(self.seconds.values()) / 3600:.2f} ({stages})",
            ]
        )


def forecast(recipe, tasks=1, sample=24):
    """The plan of a recipe.

    Args:
        recipe (`Recipe`): it is not run.
        tasks (`int`): parts that will run at once.
        sample (`int`): videos that are looked at.

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
    with tempfile.TemporaryDirectory() as folder:
        seconds, kept, size, seen = _try_out(recipe, Path(folder), videos, sample)
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
    money = tokens_in * captioner.dollars_per_million_input_tokens
    money += tokens_out * captioner.dollars_per_million_output_tokens
    picture, clip, video = size["picture"], size["clip"], size["video"]
    stills, cuts = _media_a_video(recipe, pairs, videos * share)
    rows = {t: n * sum(a * b for a, b in zip(MEDIA[t], (picture, clip, video))) for t, n in pairs.items()}
    cut_bytes = stills * picture + cuts * clip
    work = videos * share * (video * any(s.kind != "files" for s in recipe.sources) + cut_bytes)
    if recipe.output.media == "referenced":
        rows = {"all": videos * share * (video + cut_bytes)}
    texts = _time_texts(recipe, round(videos * share))
    composed = pairs.get("ti2v", 0) + pairs.get("tv2v", 0)
    wall = {
        "inspect": seconds["load"] + seconds["inspect"] * videos / seen / tasks,
        "cut": (seconds["still"] * stills + seconds["clip"] * cuts) * videos * share / len(kept) / tasks,
        "caption": texts["answer"] * sum(requests.values()) / tasks,
        "relate": texts["fit"] + texts["near"] * videos * share,
        "pair": texts["fit"] + texts["score"] * pairs.get("t2v", 0) + texts["rank"] * composed,
        "publish": seconds["publish"] * sum(rows.values()) / max(1, size["published"]) / tasks,
    }
    if captioner.kind == "endpoint":
        wall["caption"] = sum(requests.values()) * captioner.seconds_per_request / captioner.concurrency
        if captioner.requests_per_minute:
            wall["caption"] = max(wall["caption"], sum(requests.values()) * 60 / captioner.requests_per_minute)
    return Plan(
        videos=videos,
        kept=round(videos * share),
        pairs=pairs,
        requests=requests,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        dollars=money / 1e6,
        work_gigabytes=work / 1e9,
        output_gigabytes=sum(rows.values()) / 1e9,
        seconds={stage: START_SECONDS + wall.get(stage, 0.0) for stage in STAGES},
    )


def _try_out(recipe, folder, videos, sample):
    """Seconds by step, the sampled videos that were kept, mean bytes by kind of medium, how many were looked at."""
    step = max(1, videos // sample)
    documents = list(islice(list_videos(recipe, folder), 0, step * sample, step))
    steps = [TextFilter(recipe, exclusions(folder, "text")), VideoFilter(recipe, folder, exclusions(folder, "video"))]
    if recipe.quality.similarity is not None:
        steps.append(SimilarityFilter(recipe, exclusions(folder, "similarity")))
    # What is loaded once by each task, whatever the number of videos, is loaded and timed before.
    started = time.perf_counter()
    _inspected(steps, copy.deepcopy(documents[:1]))
    loaded = time.perf_counter()
    kept = _inspected(steps, documents)
    seconds = {"load": loaded - started, "inspect": time.perf_counter() - loaded}
    for kind, counts in {"still": {"stills": 1, "cuts": 0}, "clip": {"stills": 0, "cuts": 1}}.items():
        for document in kept:
            document.metadata.update(counts)
        started = time.perf_counter()
        for document in Cutter(recipe, folder).run(kept):
            document.metadata[kind] = document.metadata["frames" if kind == "still" else "clips"][0]["file"]
        seconds[kind] = time.perf_counter() - started
    files = {
        "picture": [document.metadata["still"] for document in kept],
        "clip": [document.metadata["clip"] for document in kept],
        "video": [document.metadata["file"] for document in kept],
    }
    size = {kind: sum(Path(f).stat().st_size for f in paths) / max(1, len(paths)) for kind, paths in files.items()}
    started = time.perf_counter()
    columns = features("embedded")
    rows = [
        {**dict.fromkeys(columns), "negatives": [], "target_video": {"bytes": Path(f).read_bytes(), "path": None}}
        for f in files["video"]
    ]
    write_parquet(folder / "sample", rows, columns)
    seconds["publish"] = time.perf_counter() - started
    size["published"] = size["video"] * len(rows)
    return seconds, kept, size, len(documents)


def _inspected(steps, documents):
    flow = iter(documents)
    for filters in steps:
        flow = filters.run(flow)
    return list(flow)


def _media_a_video(recipe, pairs, kept):
    """Stills and clips that are cut from a video, on average."""
    asked = {task: number * (1 + recipe.reserve) / kept for task, number in pairs.items()}
    stills = max(asked.get(task, 0) for task in ("t2i", "i2v", "ti2v"))
    return stills, max(asked.get(task, 0) for task in ("tv2v", "v2v"))


def _time_texts(recipe, kept):
    """Seconds of what is done with captions, on films of the rendered world whatever the sources.

    Returns:
        `dict`: `answer`, to read one from the graph and to check it (0 for an endpoint); `fit`, the vectors of all
        pools; `near`, the neighbours of a video; `score`, a caption beside its neighbours'; `rank`, a composed query
        among its pool.
    """
    settings = recipe.composition
    number = max(2, min(settings.pool, kept))
    started = time.perf_counter()
    answers = [
        read_answer("video_captions", graph.answer("video_captions", draw_film(recipe.seed, k))) for k in range(number)
    ]
    answer = (time.perf_counter() - started) / number
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
    return {**seconds, "answer": answer if recipe.captioner.kind == "graph" else 0.0}


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
