"""What a captioner's answer has to be: strict JSON, checked by pydantic, with the paper's word ranges."""

import json
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, RootModel, StrictStr, ValidationError, model_validator

from dataset_builders.synflow.texts import count_words, is_language


class Style(NamedTuple):
    key: str
    name: str
    meaning: str
    least: int  # words
    most: int


# Five captions a video and five a frame (arXiv 2510.27571, section 4).
VIDEO_STYLES = (
    Style("1", "concise", "the essence in a sentence", 10, 25),
    Style("2", "rich", "all of it, what is where and what happens when", 80, 200),
    Style("3", "abstract", "what it is about, in general terms", 30, 100),
    Style("4", "keywords", "keywords alone, with commas between them", 5, 30),
    Style("5", "partial", "one part or moment of it, as if the rest were unknown", 10, 70),
)
FRAME_STYLES = (
    Style("1", "concise", "the essence in a sentence", 10, 25),
    Style("2", "rich", "all of it, what is where and how it looks", 50, 200),
    Style("3", "abstract", "what it is about, in general terms", 30, 100),
    Style("4", "keywords", "keywords alone, with commas between them", 5, 30),
    Style("5", "partial", "one detail of it, as if the rest were unknown", 10, 70),
)
SHORT_WORDS, LONG_WORDS = 20, 100  # one caption has fewer, another more
MAX_QUERY_WORDS = {"frame_query": 50, "clip_query": 15}
MIN_CLIP_QUERY_WORDS = 5


class AnswerError(ValueError):
    """An answer that cannot be used; `args` are the reason's name and a sentence for the repair."""

    @property
    def reason(self):
        return self.args[0]

    def __str__(self):
        return self.args[1]


class Captions(RootModel[dict[Literal["1", "2", "3", "4", "5"], StrictStr]]):
    @model_validator(mode="after")
    def complete(self):
        if missing := sorted(set("12345") - set(self.root)):
            raise ValueError(f"keys {missing} are missing")
        return self


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid")

    query: StrictStr


def json_schema(task):
    """What `response_format` asks of servers that can bind a model to a schema."""
    if task.endswith("captions"):
        properties = {key: {"type": "string"} for key in "12345"}
    else:
        properties = {"query": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": task, "strict": True, "schema": schema}}


def read_answer(task, text):
    """The captions `{"1": ..., "5": ...}` or the query `{"query": ...}` in an answer.

    Raises:
        AnswerError: no JSON, another shape, a word range is missed, or not English.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise AnswerError("answer_not_json", f"it is no JSON ({error})") from error
    try:
        if task.endswith("captions"):
            found = Captions.model_validate(content).root
        else:
            found = Query.model_validate(content).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise AnswerError("answer_wrong_schema", problem) from error
    found = {key: " ".join(value.split()) for key, value in sorted(found.items())}
    _check_words(task, found)
    if not is_language(" ".join(found.values()), "en"):
        raise AnswerError("answer_not_english", "it is not in English")
    return found


def _check_words(task, found):
    counts = {key: count_words(value) for key, value in found.items()}
    if task in MAX_QUERY_WORDS:
        least, most = MIN_CLIP_QUERY_WORDS if task == "clip_query" else 1, MAX_QUERY_WORDS[task]
        if not least <= counts["query"] <= most:
            raise AnswerError("answer_word_range", f"the query has {counts['query']} words, not {least} to {most}")
        return
    for style in FRAME_STYLES if task == "frame_captions" else VIDEO_STYLES:
        if not style.least <= counts[style.key] <= style.most:
            problem = f'"{style.key}" has {counts[style.key]} words, not {style.least} to {style.most}'
            raise AnswerError("answer_word_range", problem)
    if min(counts.values()) >= SHORT_WORDS:
        raise AnswerError("answer_word_range", f"none of the five has fewer than {SHORT_WORDS} words")
    if max(counts.values()) <= LONG_WORDS:
        raise AnswerError("answer_word_range", f"none of the five has more than {LONG_WORDS} words")
