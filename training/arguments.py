"""Settings of `pyramid.py`: defaults, then the YAML file of `--config`, then the command line.

YAML values reach the dataclasses unconverted, so every field is checked in `__post_init__`; a message names the
setting, the value received and what is allowed.
"""

import difflib
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from trl import TrlParser

from training.curriculum import SCHEDULES
from training.losses import check_temperature


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


def _by_task(name, entries, tasks, low):
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
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise ValueError(f"{name} of {task} must be a whole number of at least {low}, got {number!r}")
        numbers[task] = number
    return numbers


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
            "help": "Embedder with `encode(items)` that scores the tasks before the first epoch: folder or Hub name. "
            "Null: the starting weights themselves. Later epochs are probed by the weights that ended the last one."
        },
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
        for name in ("num_frames", "max_tokens_per_frame", "max_length"):
            _check_number(self, name, 1, float("inf"), integer=True)

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
        _check_number(self, "max_pairs", 1, float("inf"), integer=True, optional=True)
        _check_number(self, "batch_size", 2, 65536, integer=True)
        _check_number(self, "hard_negatives", 0, 64, integer=True)
        self.task_batch_size = _by_task("task_batch_size", self.task_batch_size, self.tasks, low=2)
        self.task_hard_negatives = _by_task("task_hard_negatives", self.task_hard_negatives, self.tasks, low=0)
        _check_flag(self, "distinct_in_batch")

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
    schedule: Literal["pyramid", "uniform"] = field(
        default="pyramid", metadata={"help": "`pyramid`: P(k) ~ exp(R_k / sigma). `uniform`: every task alike."}
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
    freeze_vision: bool = field(
        default=True, metadata={"help": "Keep the vision tower as it is (the paper: frozen); saves its backward pass."}
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
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints; each epoch's end has one too."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew although run_dir has checkpoints."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push output_dir when training has ended."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub name to push to, such as org/gve-mini."})

    def __post_init__(self):
        _check_text(self, "output_dir")
        _check_text(self, "run_dir", optional=True)
        self.run_dir = self.run_dir or str(Path(self.output_dir) / "run")
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
            ("adam_beta2", 0, 1),
            ("max_grad_norm", 1e-6, infinity),
        ):
            _check_number(self, name, low, high)
        for name, low in (("epochs", 1), ("probe_pairs", 1), ("seed", 0), ("save_steps", 1), ("save_total_limit", 1)):
            _check_number(self, name, low, infinity, integer=True)
        _check_number(self, "steps_per_epoch", 1, infinity, integer=True, optional=True)
        _check_number(self, "cpu_threads", 1, 1024, integer=True, optional=True)
        _check_number(self, "mask_identical", 0, 2, optional=True)
        _check_number(self, "mask_margin", 0, 2, optional=True)
        for name in ("cross_device_negatives", "freeze_vision", "overwrite", "push_to_hub"):
            _check_flag(self, name)
        _check_text(self, "hub_model_id", optional=True)
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, such as org/gve-mini")


# What a resumed run may change: where and how often things are written, not what is computed.
FREE_SETTINGS = {"output_dir", "run_dir", "cpu_threads", "save_steps", "save_total_limit", "overwrite"}
FREE_SETTINGS |= {"push_to_hub", "hub_model_id"}


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
