"""The recipe: one YAML file that fully determines a dataset.

The same recipe, seed and captioner answers give the same bytes. Settings that only say how fast or from where the
answers come (`FREE`) are no part of the recipe's fingerprint.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


FORMATS = ("t2t", "t2i", "t2v", "ti2v", "tv2v", "i2v", "v2v")

# UVRD's pairs by format (arXiv 2510.27571, training mixture).
PAPER_BUDGETS = {
    "t2t": 100_000,
    "t2i": 210_000,
    "t2v": 879_000,
    "ti2v": 89_000,
    "tv2v": 35_000,
    "i2v": 200_000,
    "v2v": 36_000,
}
PAPER_PROFILES = {"spatial": 0.3, "temporal": 0.6, "other": 0.1}

FREE = {
    "captioner": {
        "url",
        "api_key_env",
        "concurrency",
        "requests_per_minute",
        "timeout_seconds",
        "patience_seconds",
        "seconds_per_request",
        "tokens_per_frame",
        "dollars_per_million_input_tokens",
        "dollars_per_million_output_tokens",
    },
    "slurm": True,
}

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names the file, the setting and the remedy."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilesSource(Settings):
    """A folder of videos and a JSON Lines file of `{"video": path in the folder, "text": raw caption}`.

    A line may also bring `"source"`, the longer video that it was cut from: splits never part such clips.
    """

    kind: Literal["files"]
    id: Name
    folder: str
    captions: str = "captions.jsonl"


class DatasetSource(Settings):
    """A dataset that `datasets` streams, with a column of video files or bytes and one of raw captions.

    `source` names a column of the longer video that a row was cut from: splits never part such clips.
    """

    kind: Literal["dataset"]
    id: Name
    repo: str
    config: str | None = None
    split: str = "train"
    video: str = "video"
    text: str = "text"
    source: str | None = None
    limit: int | None = Field(None, gt=0)


class RenderedSource(Settings):
    """Films of the rendered world with noisy captions; `faults` of them are made bad in known ways."""

    kind: Literal["rendered"]
    id: Name
    videos: int = Field(gt=0)
    faults: float = Field(0.0, ge=0, le=0.5)


Source = Annotated[FilesSource | DatasetSource | RenderedSource, Field(discriminator="kind")]


class TextQuality(Settings):
    # Not in the paper: all of these limits.
    min_words: int = Field(3, ge=1)
    language: str | None = "en"
    max_repeats: int = Field(50, ge=1, description="videos that may share one text")


class VideoQuality(Settings):
    # Not in the paper: all of these limits.
    min_seconds: float = Field(1.0, ge=0)
    max_seconds: float = Field(3600.0, gt=0)
    min_side: int = Field(96, ge=1)
    max_side: int = Field(8192, ge=1)
    min_motion: float = Field(8.0, ge=0, description="levels of 0 to 255; below it a video is static")
    max_bytes: int = Field(2 << 30, gt=0)


class Duplicates(Settings):
    # Not in the paper: bits of a video's 1,024-bit signature in which near-duplicates may differ, and of its 512 bits
    # of luma, which another encoding changes less than those of colour.
    max_bits: int = Field(130, ge=0, le=300)
    max_luma_bits: int = Field(24, ge=0, le=300)


class Similarity(Settings):
    """Cross-modal filter: cosine of caption and video under an embedder.

    `model` is a folder or Hub id of a GVE or sentence-transformers model (its own code is run), as
    `evaluate_metrics.encoders.open_encoder` names it, or "graph" for rendered videos. The paper gives no threshold:
    set one, or drop the lowest share of all scored pairs with `percentile`.
    """

    model: str
    threshold: float | None = Field(None, ge=-1, le=1)
    percentile: float | None = Field(None, gt=0, lt=100)
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def one_rule(self):
        if (self.threshold is None) == (self.percentile is None):
            raise ValueError("give either threshold or percentile")
        return self


class Cutting(Settings):
    # Not in the paper: shots are told by the difference of consecutive frames.
    shot_difference: float = Field(16.0, gt=0, description="grey levels")
    shot_ratio: float = Field(3.0, gt=1, description="times the usual difference around")
    min_shot_seconds: float = Field(1.0, gt=0)
    frames_per_video: int = Field(2, ge=1)
    clips_per_video: int = Field(1, ge=1)
    jpeg_quality: int = Field(92, ge=1, le=100)


class Quality(Settings):
    text: TextQuality = TextQuality()
    video: VideoQuality = VideoQuality()
    duplicates: Duplicates = Duplicates()
    similarity: Similarity | None = None
    cutting: Cutting = Cutting()


class Captioner(Settings):
    """The model that writes captions and queries.

    `kind: endpoint` is any server that speaks the OpenAI protocol (vLLM, SGLang, `transformers serve`, a provider);
    `kind: graph` reads rendered videos' scene graphs in-process. The key comes from the environment variable
    `api_key_env`, never from the recipe.
    """

    kind: Literal["endpoint", "graph"] = "endpoint"
    model: str = "graph"
    url: str = ""
    api_key_env: str | None = None
    send: Literal["frames", "video"] = "frames"
    structured: bool = False  # send the JSON schema as response_format; not every server takes it
    # Not in the paper: the numbers below.
    frames: int = Field(8, ge=1, le=64)
    side: int = Field(448, ge=28, le=2048)
    temperature: float = Field(0.7, ge=0, le=2)
    max_tokens: int = Field(1536, ge=1)
    retries: int = Field(3, ge=0, description="fresh tries after a bad answer and its repair")
    concurrency: int = Field(16, ge=1)
    requests_per_minute: float | None = Field(None, gt=0)
    timeout_seconds: float = Field(120.0, gt=0)
    patience_seconds: float = Field(900.0, gt=0, description="how long one request outlasts a server that is down")
    seconds_per_request: float = Field(4.0, ge=0, description="for --plan")
    tokens_per_frame: int = Field(256, ge=1, description="for --plan")
    dollars_per_million_input_tokens: float = Field(0.0, ge=0)
    dollars_per_million_output_tokens: float = Field(0.0, ge=0)

    def dollars(self, input_tokens, output_tokens):
        dear = input_tokens * self.dollars_per_million_input_tokens
        return (dear + output_tokens * self.dollars_per_million_output_tokens) / 1e6

    @model_validator(mode="after")
    def has_url(self):
        if self.kind == "endpoint" and not self.url.startswith(("http://", "https://")):
            raise ValueError("kind: endpoint needs url, such as http://127.0.0.1:8000/v1")
        return self


class Composition(Settings):
    """Composed queries and hard negatives come from related videos: neighbours by caption within a pool."""

    # Not in the paper: all of these.
    pool: int = Field(4096, ge=2, description="videos compared with one another")
    min_similarity: Share = 0.2
    max_similarity: Share = 0.98
    text_alone_rank: int = Field(1, ge=0, description="drop a query whose text alone ranks its target so high")


class Output(Settings):
    media: Literal["embedded", "referenced"] = "embedded"
    rows_per_shard: int = Field(2000, ge=1)
    validation_share: Share = 0.02


class Decontamination(Settings):
    """Drops what is in the benchmark, a UVRB repo: the videos and the texts of its corpora and queries.

    A video is in it if it is like one of its videos as a whole, or shares footage with one: one is cut from the other,
    or both from the same.
    """

    benchmark: str
    # Not in the paper: bits as in `Duplicates`; those of one frame's 128 and 64, by which shared footage is told;
    # share of a text's 8-word sequences that occur in a benchmark text.
    max_bits: int = Field(130, ge=0, le=300)
    max_luma_bits: int = Field(24, ge=0, le=300)
    max_frame_bits: int = Field(12, ge=0, le=40)
    max_frame_luma_bits: int = Field(3, ge=0, le=20)
    min_shared_seconds: float = Field(3.0, gt=0, description="or three quarters of the shorter video")
    ngram: int = Field(8, ge=2)
    max_overlap: Share = 0.5


class Slurm(Settings):
    partition: str = "cpu"
    time: str = "24:00:00"
    cpus_per_task: int = Field(2, ge=1)
    mem_per_cpu_gb: int = Field(4, ge=1)
    env_command: str | None = None


class Recipe(Settings):
    """A dataset from sources to Parquet."""

    name: Name
    seed: int = 0
    sources: list[Source] = Field(min_length=1)
    part_size: int = Field(128, ge=1, description="videos a part, the unit of work and of resuming")
    pairs: Literal["raw", "filtered", "synthesised"] = Field(
        "synthesised", description="how far the flow goes; the first two are what its pairs are compared with"
    )
    quality: Quality = Quality()
    captioner: Captioner | None = None
    profiles: dict[Literal["spatial", "temporal", "other"], Share] = PAPER_PROFILES
    caption_rounds: int = Field(1, ge=1, le=16, description="times five captions a video, each under its own profile")
    budgets: dict[Literal[FORMATS], int] = PAPER_BUDGETS
    # Not in the paper: where there are too few videos, all budgets shrink by one factor, so that proportions stay.
    shrink: bool = True
    pairs_per_video: dict[Literal[FORMATS], int] = {}
    reserve: Share = 0.3  # of the answers asked for beyond a budget, because some are dropped
    composition: Composition = Composition()
    decontamination: Decontamination | None = None
    output: Output = Output()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def consistent(self):
        if abs(sum(self.profiles.values()) - 1) > 1e-6:
            raise ValueError(f"profiles add up to {sum(self.profiles.values()):g}: they are shares of 1")
        if len({source.id for source in self.sources}) < len(self.sources):
            raise ValueError("two sources have one id: give each its own")
        if any(number < 0 for number in self.budgets.values()) or not any(self.budgets.values()):
            raise ValueError("budgets: give numbers of pairs, at least one above 0")
        if any(number < 1 for number in self.pairs_per_video.values()):
            raise ValueError("pairs_per_video: give numbers of at least 1")
        if self.pairs != "synthesised" and set(self.budgets) != {"t2v"}:
            raise ValueError(f"pairs: {self.pairs} ones are captions and their videos: set budgets: {{t2v: NUMBER}}")
        if self.pairs == "synthesised" and self.captioner is None:
            raise ValueError("captioner: is missing; say who writes the captions")
        reads_graph = (self.captioner is not None and self.captioner.kind == "graph") or (
            self.quality.similarity is not None and self.quality.similarity.model == "graph"
        )
        if reads_graph and any(source.kind != "rendered" for source in self.sources):
            raise ValueError("graph reads scene graphs, which rendered sources alone have: name a model")
        return self

    def most_pairs(self, task):
        return self.pairs_per_video.get(task, 1)

    @cached_property
    def fingerprint(self):
        """12 hex digits that change with every setting that may change the data."""
        settings = json.dumps(self.model_dump(mode="json", exclude=FREE), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:12]


def load_recipe(path):
    """The recipe in a YAML file.

    Raises:
        RecipeError: missing, no YAML, or a setting is unknown or out of range.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: holds no settings; see the examples in dataset_builders/synflow/recipes")
    try:
        return Recipe(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise RecipeError(f"{path}: {'; '.join(problems)}") from error
