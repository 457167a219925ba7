"""Settings of `pyramid.py`: defaults, then the YAML file of `--config`, then the command line.

YAML values reach the dataclasses unconverted, so every field is checked in `__post_init__`; a message names the
setting, the value received and what is allowed.
"""

import difflib
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from trl import TrlParser

from training.curriculum import SCHEDULES
from training.losses import check_temperature


TRACKERS = ("trackio", "tensorboard", "wandb")


def _check_number(settings, name, low, high, integer=False, optional=False):
    value = getattr(settings, name)
    if optional and value is None:
        return
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if integer else "a number"
        none = " or null" if optional else ""
        limit = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise ValueError(f"{name} must be {kind} {limit}{none}, got {value!r}")


def _check_choice(settings, name, choices):
    if getattr(settings, name) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(settings, name)!r}")


def _check_flag(settings, name):
    if not isinstance(getattr(settings, name), bool):
        raise ValueError(f"{name} must be true or false, got {getattr(settings, name)!r}")


def _check_text(settings, name, optional=False):
    value = getattr(settings, name)
    if not (isinstance(value, str) and value) and not (optional and value is None):
        raise ValueError(f"{name} must be a text{' or null' if optional else ''}, got {value!r}")


def _by_task(name, entries, tasks, low, integer=True):
    """`{task: number}` from a YAML mapping or from `task=number` words of the command line."""
    if isinstance(entries, dict):
        pairs = list(entries.items())
    elif isinstance(entries, (list, tuple)) and all(isinstance(entry, str) for entry in entries):
        pairs = [(task, number) for task, _, number in (entry.partition("=") for entry in entries)]
    else:
        raise ValueError(f"{name} must be a mapping such as {{t2v: 96}} (t2v=96 on the command line), got {entries!r}")
    numbers = {}
    for task, number in pairs:
        if task not in tasks:
            raise ValueError(f"{name} names the task {task!r}, which is not among tasks: {', '.join(tasks)}")
        if isinstance(number, str):
            number = _number(number, integer)
        kinds = int if integer else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds) or not low <= number < float("inf"):
            kind = "a whole number" if integer else "a number"
            raise ValueError(f"{name} of {task} must be {kind} of at least {low}, got {number!r}")
        numbers[task] = number
    return numbers


def _number(word, integer):
    """The number that a word of the command line spells, or the word."""
    try:
        return int(word) if integer else float(word)
    except ValueError:
        return word


def _check_texts(settings, name):
    value = getattr(settings, name)
    valid = isinstance(value, list) and value and all(isinstance(each, str) and each for each in value)
    if not valid or len(set(value)) < len(value):
        raise ValueError(f"{name} must be a list of different names, got {value!r}")


@dataclass
class ModelArguments:
    """Where the weights come from."""

    model: str = field(
        default="gve-mini-base",
        metadata={"help": "Folder or Hub name of a GVE repo, or of a Qwen2.5-VL with its language-model head."},
    )
    prober: str | None = field(
        default=None,
        metadata={
            "help": "Embedder that scores the tasks before the first epoch: folder or Hub name of a GVE repo, a model "
            "with `encode(items)` or a sentence-transformers model. Null: the starting weights themselves. Later "
            "epochs are probed by the weights that ended the last one."
        },
    )
    method: Literal["full", "lora"] = field(
        default="full", metadata={"help": "`lora`: adapters on the language model (the paper). `full`: its weights."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters (the paper: 16)."})
    lora_alpha: float = field(default=32, metadata={"help": "Their scale (the paper: 32)."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before them (the paper: 0.1)."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
        metadata={"help": "Linear layers of the language model that get one (the paper's six; o_proj is not one)."},
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "`4bit` or `8bit`: pack the base under LoRA by bitsandbytes; or null."},
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the starting weights. Full training wants float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Such as flash_attention_2. Null: transformers' choice."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass instead of keeping them."}
    )
    freeze_vision: bool = field(
        default=True, metadata={"help": "Keep the vision tower as it is (the paper: frozen); saves its backward pass."}
    )
    remember_vision: bool = field(
        default=False,
        metadata={
            "help": "On CPUs: compute a frozen tower's features once a medium and keep them in run_dir's cache."
        },
    )
    freeze_embeddings: bool = field(
        # The paper freezes them; so does LoRA. A small model trained in full needs them.
        default=False,
        metadata={"help": "Keep the token embeddings in full training."},
    )
    num_frames: int = field(
        default=8,
        metadata={"help": "Frames a video. This and the next two are for a backbone; a GVE repo has its own."},
    )
    max_tokens_per_frame: int = field(default=200, metadata={"help": "A frame gets fewer visual tokens than this."})
    max_length: int = field(default=8192, metadata={"help": "Most tokens of an input; only text is cut to fit."})

    def __post_init__(self):
        _check_text(self, "model")
        _check_text(self, "prober", optional=True)
        for name in ("num_frames", "max_tokens_per_frame", "max_length", "lora_rank"):
            _check_number(self, name, 1, float("inf"), integer=True)
        _check_choice(self, "method", ("full", "lora"))
        _check_choice(self, "dtype", ("float32", "bfloat16"))
        _check_number(self, "lora_alpha", 1e-6, float("inf"))
        _check_number(self, "lora_dropout", 0, 1)
        _check_texts(self, "lora_targets")
        _check_text(self, "attn_implementation", optional=True)
        for name in ("gradient_checkpointing", "freeze_vision", "remember_vision", "freeze_embeddings"):
            _check_flag(self, name)
        if self.remember_vision and self.method == "full" and not self.freeze_vision:
            raise ValueError("remember_vision needs a frozen vision tower: set freeze_vision, or method lora")
        if self.quantization is not None:
            _check_choice(self, "quantization", ("4bit", "8bit"))
            if self.method != "lora":
                raise ValueError("quantization packs weights that do not learn: it needs method lora")

    def input_limits(self):
        """Arguments of `GVEModel.from_pretrained` for a backbone."""
        names = ("num_frames", "max_tokens_per_frame", "max_length")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataArguments:
    """Which pairs, and how a batch is made of them."""

    pairs: str = field(
        default="build/hub/org/uvrd-mini", metadata={"help": "Training-pairs repo: a folder or Hub name."}
    )
    split: str = field(default="train", metadata={"help": "Its split."})
    tasks: list[str] = field(
        default_factory=lambda: ["t2t", "t2i", "t2v", "ti2v", "tv2v", "i2v", "v2v"],
        metadata={"help": "Configs of the repo; each is one task of the curriculum."},
    )
    max_pairs: int | None = field(default=None, metadata={"help": "Read at most so many pairs a task (debugging)."})
    task_pairs: list[str] = field(
        default_factory=list,
        metadata={"help": "Pairs a task in the mixture, {webvid-t2v: 5400000}: at most so many are read."},
    )
    task_upsampling: list[str] = field(
        default_factory=list,
        metadata={"help": "Factors on the P(k) of tasks, {t2v: 2}, under any schedule; an epoch grows with them."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the pairs window by window instead of all before the first step. See streaming.py."},
    )
    window_pairs: int = field(
        # Not in the paper: wide enough that few pairs are left over at a window's end.
        default=8192,
        metadata={"help": "Pairs of a task that streaming holds, and shuffles, at a time."},
    )
    loader_workers: int = field(
        default=0, metadata={"help": "Processes that prepare batches ahead of the steps. 0: the training process."}
    )
    batch_size: int = field(default=64, metadata={"help": "Queries a rank and step (the paper: 32 or 64)."})
    hard_negatives: int = field(
        default=1, metadata={"help": "Hard negatives a query (N), where its row has them (the paper: 0 to 3)."}
    )
    task_batch_size: list[str] = field(
        default_factory=list, metadata={"help": "Exceptions to batch_size: {t2v: 96} in YAML, t2v=96 as words."}
    )
    task_hard_negatives: list[str] = field(
        default_factory=list, metadata={"help": "Exceptions to hard_negatives, written likewise."}
    )
    distinct_in_batch: bool = field(
        default=True,
        metadata={
            "help": "Never put two pairs of the same source, the same query or the same target in one batch: they "
            "would be false negatives of one another. Not in the paper."
        },
    )

    def __post_init__(self):
        _check_text(self, "pairs")
        _check_text(self, "split")
        valid = isinstance(self.tasks, list) and all(isinstance(task, str) and task for task in self.tasks)
        if not valid or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be a list of different config names of the pairs repo, got {self.tasks!r}")
        self.task_pairs = _by_task("task_pairs", self.task_pairs, self.tasks, low=2)
        self.task_upsampling = _by_task("task_upsampling", self.task_upsampling, self.tasks, low=0, integer=False)
        if not any(self.task_upsampling.get(task, 1) for task in self.tasks):
            raise ValueError("task_upsampling is 0 for every task: give one of them more")
        _check_flag(self, "streaming")
        _check_number(self, "window_pairs", 2, float("inf"), integer=True)
        _check_number(self, "loader_workers", 0, 256, integer=True)
        _check_number(self, "max_pairs", 1, float("inf"), integer=True, optional=True)
        _check_number(self, "batch_size", 2, 65536, integer=True)
        _check_number(self, "hard_negatives", 0, 64, integer=True)
        self.task_batch_size = _by_task("task_batch_size", self.task_batch_size, self.tasks, low=2)
        self.task_hard_negatives = _by_task("task_hard_negatives", self.task_hard_negatives, self.tasks, low=0)
        _check_flag(self, "distinct_in_batch")

    def max_pairs_of(self, task):
        """Most pairs of a task that are read, or None."""
        limits = [limit for limit in (self.max_pairs, self.task_pairs.get(task)) if limit is not None]
        return min(limits, default=None)

    def batch_size_of(self, task):
        """Queries a rank and step of a task (B)."""
        return self.task_batch_size.get(task, self.batch_size)

    def hard_negatives_of(self, task):
        """Hard negatives a query of a task (N)."""
        return self.task_hard_negatives.get(task, self.hard_negatives)


@dataclass
class TrainingArguments:
    """Curriculum, objective, optimiser, and what is kept of the run."""

    output_dir: str = field(
        default="build/hub/org/gve-mini", metadata={"help": "The trained GVE repo: model, processor, code, record."}
    )
    run_dir: str | None = field(
        default=None,
        metadata={"help": "Checkpoints, frame cache and step log. Null: `run` inside output_dir (never pushed)."},
    )
    epochs: int = field(default=3, metadata={"help": "Epochs of the curriculum (the paper: 3)."})
    steps_per_epoch: int | None = field(
        default=None, metadata={"help": "Null: the number of pairs over the number of queries a step."}
    )
    schedule: Literal["pyramid", "reversed", "uniform", "proportional", "temperature", "difficulty", "progress"] = (
        field(
            default="pyramid",
            metadata={
                "help": "`pyramid`: P(k) ~ exp(R_k / sigma) (the paper). `reversed`: hard tasks first. `uniform`: all "
                "alike. `proportional`: by size. `temperature`: by size to the power of sampling_alpha. `difficulty`: "
                "by what is left of a task's loss. `progress`: by what the last epoch took of it."
            },
        )
    )
    sampling_alpha: float = field(
        default=0.5, metadata={"help": "Exponent of the `temperature` schedule: 0 is uniform, 1 proportional."}
    )
    sigma_min: float = field(default=0.1, metadata={"help": "The scheduler's temperature in the first epoch."})
    sigma_max: float = field(default=1.0, metadata={"help": "The scheduler's temperature in the last epoch."})
    probe_pairs: int = field(
        # Not in the paper: how many pairs the prober samples. The same sample serves every epoch.
        default=64,
        metadata={"help": "Positive pairs a task that the prober scores (N_p)."},
    )
    temperature: float = field(default=0.03, metadata={"help": "Temperature of InfoNCE."})
    mask_identical: float | None = field(
        default=1e-5, metadata={"help": "Mask candidates whose cosine with the positive is within this of 1; or null."}
    )
    mask_margin: float | None = field(
        default=0.1, metadata={"help": "Mask candidates that outscore the positive by more than this; or null."}
    )
    cross_device_negatives: bool = field(default=True, metadata={"help": "Contrast with the other ranks' batches."})
    symmetric: bool = field(default=True, metadata={"help": "Both directions of the loss; false leaves out y -> q."})
    matryoshka_dims: list[int] = field(
        default_factory=list,
        metadata={"help": "Also train these prefixes of the embedding, such as [512, 128]. Not in the paper."},
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Gradient caching: most items in one forward pass. Null: off, as in the paper's run."},
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate of AdamW (the paper: 3e-5)."})
    min_learning_rate_ratio: float = field(
        default=0.0, metadata={"help": "Where the cosine ends, as a share of the peak."}
    )
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with a linear warmup."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW; matrices only, not norms and biases."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second-moment decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(default=42, metadata={"help": "Of data order, task draws and probe samples."})
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of a process on a CPU. Null: its share of the cores (accelerate would set 1)."},
    )
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers of Accelerate: trackio, tensorboard, wandb."}
    )
    negative_corpus: str | None = field(
        default=None,
        metadata={"help": "Corpus to mine hard negatives from with the prober: folder or Hub name; see mine.py."},
    )
    mine_top_k: int = field(
        # Not in the paper: it gives no number. Twice what a step takes at most, so that passes vary.
        default=6,
        metadata={"help": "Mined hard negatives kept a query; a step takes hard_negatives of them."},
    )
    mine_margin: float = field(
        # Not in the paper: as the authors' false-negative mask, but from below.
        default=0.0,
        metadata={"help": "A mined negative scores less than the positive by at least this cosine."},
    )
    mine_relative_margin: float = field(
        # Not in the paper: NV-Retriever's TopK-PercPos at 95%.
        default=0.95,
        metadata={"help": "A mined negative scores at most this share of the positive's cosine."},
    )
    mine_every_epoch: bool = field(
        default=False, metadata={"help": "Mine again at each epoch's start, with that epoch's prober."}
    )
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints; each epoch's end has one too."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    plan: bool = field(default=False, metadata={"help": "Print what the recipe needs, and train nothing."})
    plan_devices: int = field(default=32, metadata={"help": "For plan: GPUs (the paper: 32 x A100 80GB)."})
    plan_pairs_per_second: float | None = field(
        default=None, metadata={"help": "For plan: measured pairs a second and GPU. Null: estimated from FLOPs."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start anew although run_dir has checkpoints."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push output_dir when training has ended."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub name to push to, such as org/gve-mini."})

    def __post_init__(self):
        _check_text(self, "output_dir")
        _check_text(self, "run_dir", optional=True)
        self.run_dir = self.run_dir or str(Path(self.output_dir) / "run")
        output, run = Path(self.output_dir).resolve(), Path(self.run_dir).resolve()
        if run == output or output in run.parents and output / "run" not in (run, *run.parents):
            raise ValueError(f"run_dir {self.run_dir} would be pushed with output_dir: leave it out, or move it")
        _check_choice(self, "schedule", SCHEDULES)
        self.temperature = check_temperature(self.temperature)
        infinity = float("inf")
        for name, low, high in (
            ("sigma_min", 1e-3, 1e3),
            ("sigma_max", 1e-3, 1e3),
            ("learning_rate", 0, 1),
            ("min_learning_rate_ratio", 0, 1),
            ("warmup_ratio", 0, 1),
            ("weight_decay", 0, 10),
            ("adam_beta2", 0, 0.999999),
            ("max_grad_norm", 1e-6, infinity),
            ("sampling_alpha", 0, 1),
            ("mine_margin", 0, 2),
            ("mine_relative_margin", 0, 1),
        ):
            _check_number(self, name, low, high)
        for name, low in (("epochs", 1), ("probe_pairs", 1), ("seed", 0), ("save_steps", 1), ("save_total_limit", 1)):
            _check_number(self, name, low, infinity, integer=True)
        _check_number(self, "steps_per_epoch", 1, infinity, integer=True, optional=True)
        _check_number(self, "cpu_threads", 1, 1024, integer=True, optional=True)
        _check_number(self, "mask_identical", 0, 2, optional=True)
        _check_number(self, "mask_margin", 0, 2, optional=True)
        _check_number(self, "micro_batch_size", 1, infinity, integer=True, optional=True)
        _check_number(self, "mine_top_k", 1, 1024, integer=True)
        _check_number(self, "plan_devices", 1, infinity, integer=True)
        _check_number(self, "plan_pairs_per_second", 1e-6, infinity, optional=True)
        for name in ("cross_device_negatives", "symmetric", "mine_every_epoch", "plan", "overwrite", "push_to_hub"):
            _check_flag(self, name)
        _check_text(self, "negative_corpus", optional=True)
        if self.mine_every_epoch and self.negative_corpus is None:
            raise ValueError("mine_every_epoch needs negative_corpus, a corpus to mine from")
        for name in ("matryoshka_dims", "report_to"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(f"{name} must be a list, got {getattr(self, name)!r}")
        for size in self.matryoshka_dims:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"matryoshka_dims must be whole numbers of at least 1, got {size!r}")
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ValueError(f"report_to must be among {', '.join(TRACKERS)}, got {tracker!r}")
        _check_text(self, "hub_model_id", optional=True)
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, such as org/gve-mini")
        if self.hub_model_id is not None and not re.fullmatch(r"[^/]+/[^/]+", self.hub_model_id):
            raise ValueError(f"hub_model_id must be owner/name, such as org/gve-mini, got {self.hub_model_id!r}")


# What a resumed run may change: where and how often things are written, not what is computed.
FREE_SETTINGS = {"output_dir", "run_dir", "cpu_threads", "save_steps", "save_total_limit", "overwrite"}
FREE_SETTINGS |= {"push_to_hub", "hub_model_id", "report_to", "loader_workers", "plan"}
FREE_SETTINGS |= {"plan_devices", "plan_pairs_per_second"}


class _Parser(TrlParser):
    """TrlParser whose every complaint is one `ValueError`, with the nearest setting's name for an unknown one."""

    def error(self, message):
        raise ValueError(message)

    def unknown(self, keys, where):
        known = [f.name for kind in self.dataclass_types for f in fields(kind)]
        near = difflib.get_close_matches(keys[0].replace("-", "_"), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the settings"
        return ValueError(f"unknown setting {', '.join(keys)} {where}{hint}")


def parse_arguments(words=None):
    """Read the settings of a run.

    Args:
        words (`list[str]`, *optional*): the command line without the program; default: `sys.argv[1:]`.

    Returns:
        `tuple` of [`ModelArguments`], [`DataArguments`] and [`TrainingArguments`].

    Raises:
        ValueError: one line on an unknown setting, a bad value, or a config file that is missing or no mapping.
    """
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), prog="pyramid.py", allow_abbrev=False)
    try:
        *settings, from_config, from_words = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    except OSError as error:
        raise ValueError(f"cannot read the config file {error.filename}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the config file is not YAML: {' '.join(str(error).split())}") from error
    except IndexError as error:
        raise ValueError("--config needs a file") from error
    if from_config:
        raise parser.unknown([word.removeprefix("--") for word in from_config[::2]], "in the config file")
    flags = [word for word in from_words if word.startswith("-")]
    if flags:
        raise parser.unknown([flag.lstrip("-").partition("=")[0] for flag in flags], "on the command line")
    if from_words:
        raise ValueError(f"{from_words[0]!r} on the command line belongs to no setting")
    return tuple(settings)


def computed_settings(*arguments):
    """The settings that decide the weights, as plain values; a checkpoint belongs to exactly these."""
    merged = {}
    for group in arguments:
        merged.update(asdict(group))
    return {name: value for name, value in merged.items() if name not in FREE_SETTINGS}


def rank_zero():
    """Whether this process is the one that speaks, before any process group exists."""
    return os.environ.get("RANK", "0") == "0"
