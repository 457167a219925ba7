"""What the captioner is asked: Jinja templates in our own words that keep the constraints of the paper's prompts."""

import hashlib
from functools import cache
from pathlib import Path

import jinja2

from dataset_builders.mini.world import generator, pick
from dataset_builders.synflow.answers import FRAME_STYLES, MAX_QUERY_WORDS, MIN_CLIP_QUERY_WORDS, VIDEO_STYLES


TASKS = ("video_captions", "frame_captions", "frame_query", "clip_query")

# Not in the paper: what the two slots are filled with at random.
READABILITY = ("very easy", "easy", "ordinary", "demanding")
EDUCATION = ("primary school", "secondary school", "college", "a doctorate")
MAX_HINT_WORDS = 60

_STYLES = {"video_captions": VIDEO_STYLES, "frame_captions": FRAME_STYLES}
_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=False,
)


@cache
def prompt_hash(task):
    """12 hex digits of the task's template, of the repair's and of the styles: it stands on every row made by them."""
    texts = [_environment.loader.get_source(_environment, f"{name}.j2")[0] for name in (task, "repair")]
    texts.append(repr(_STYLES.get(task)))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def draw_profile(seed, content, profiles):
    """Which information the captions of a video dwell on, by its content, so that it is the same in every run."""
    rng = generator("profile", seed, content)
    names = sorted(profiles)  # whatever order the recipe's file has them in
    return str(rng.choice(names, p=[profiles[name] for name in names]))


def write_prompt(task, seed, content, captioner, profile=None, hint=None):
    """The text of a request.

    Args:
        task (`str`): of `TASKS`.
        seed (`int`): with `content` it fills the random slots.
        content (`str`): what the request is about, by hash.
        captioner (`Captioner`): whether it gets frames or videos.
        profile (`str`, *optional*): of video captions.
        hint (`str`, *optional*): the raw caption; cut at 60 words.
    """
    rng = generator("slots", seed, task, content)
    return _environment.get_template(f"{task}.j2").render(
        sends_video=captioner.send == "video",
        frames=captioner.frames,
        styles=_STYLES.get(task),
        profile=profile,
        readability=pick(rng, READABILITY),
        education=pick(rng, EDUCATION),
        hint=" ".join(hint.split()[:MAX_HINT_WORDS]).replace("<<<", "").replace(">>>", "") if hint else None,
        least_words=MIN_CLIP_QUERY_WORDS,
        most_words=MAX_QUERY_WORDS.get(task),
    )


def write_repair(problem):
    return _environment.get_template("repair.j2").render(problem=problem)
