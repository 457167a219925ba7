"""What a sweep varies: frames and tokens that a model reads, dimensions and precision of the vectors that it gives."""

import itertools
from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluate_metrics.retrieval_data import UvrbError


PRECISIONS = {"float32": 32, "bfloat16": 16, "int8": 8, "ubinary": 1}  # bits a dimension


@dataclass(frozen=True)
class Setting:
    """One way to use a model; `None` leaves its own.

    Args:
        num_frames (`int`, *optional*): frames read from a video.
        max_tokens_per_frame (`int`, *optional*): a frame gets fewer visual tokens than this.
        truncate_dim (`int`, *optional*): leading dimensions that are kept.
        precision (`str`): `float32`, `bfloat16`, `int8` or `ubinary`.
    """

    num_frames: int | None = None
    max_tokens_per_frame: int | None = None
    truncate_dim: int | None = None
    precision: str = "float32"

    def __post_init__(self):
        for name in ("num_frames", "max_tokens_per_frame", "truncate_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UvrbError(f"{name} is {getattr(self, name)}; give whole numbers from 1.")
        if self.precision not in PRECISIONS:
            raise UvrbError(f"precision is {self.precision!r}; choose {', '.join(PRECISIONS)}.")

    @property
    def limits(self) -> dict[str, int]:
        """What the model must be told before it embeds."""
        limits = {"num_frames": self.num_frames, "max_tokens_per_frame": self.max_tokens_per_frame}
        return {name: value for name, value in limits.items() if value is not None}

    @property
    def changes(self) -> dict:
        """What differs from the model's own way."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "float32")}


def sweep(num_frames=None, max_tokens_per_frame=None, truncate_dim=None, precision=None):
    """All combinations of the given values, the first values first, as a list of `Setting`."""
    axes = (num_frames or [None], max_tokens_per_frame or [None], truncate_dim or [None], precision or ["float32"])
    return list(dict.fromkeys(Setting(*values) for values in itertools.product(*axes)))


def reduce_embeddings(embeddings, setting):
    """Embeddings with fewer dimensions and in a lower precision, as vectors whose cosine is the score.

    int8 scales each vector by its largest component, so that nothing is calibrated; ubinary keeps the signs, as
    vectors of -1 and 1, whose cosine orders as the Hamming distance of the packed bits does.

    Args:
        embeddings (`numpy.ndarray` of shape `(N, D)`): float32; NaN rows stay without a cosine.
        setting (`Setting`): its `truncate_dim` and `precision` are used.

    Returns:
        `numpy.ndarray` of shape `(N, truncate_dim or D)`: float32 or int8.

    Raises:
        UvrbError: more dimensions are asked for than there are.
    """
    if setting.truncate_dim is not None:
        if setting.truncate_dim > embeddings.shape[1]:
            raise UvrbError(f"truncate_dim is {setting.truncate_dim}; the model's vectors have {embeddings.shape[1]}.")
        embeddings = embeddings[:, : setting.truncate_dim]
    if setting.precision == "float32":
        return embeddings
    if setting.precision == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(embeddings)).bfloat16().float().numpy()
    known = np.isfinite(embeddings).all(axis=1, keepdims=True) & (embeddings != 0).any(axis=1, keepdims=True)
    vectors = np.where(known, embeddings, 0)  # zeros have no cosine either
    if setting.precision == "ubinary":
        return np.where(known, np.where(vectors > 0, 1, -1), 0).astype(np.int8)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors / np.where(known, largest, 1) * 127).astype(np.int8)


def bytes_per_vector(n_dimensions, setting):
    """Storage of one vector: its kept dimensions at the setting's precision, in whole bytes.

    >>> bytes_per_vector(2048, Setting()), bytes_per_vector(2048, Setting(truncate_dim=100, precision="ubinary"))
    (8192, 13)
    """
    return -(-(setting.truncate_dim or n_dimensions) * PRECISIONS[setting.precision] // 8)
