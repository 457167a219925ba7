"""What must not be in training data: the benchmark's videos and texts."""

from functools import lru_cache

import datasets
import numpy as np

from dataset_builders.synflow.footage import FootageError, look_at, signature
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.texts import ngrams


@lru_cache(maxsize=2)
def load_benchmark(settings, limits):
    """Signatures `{config/id: (128,) uint8}` of a UVRB repo's videos, and all word sequences of its texts.

    Queries are videos too, in some tasks clips of those in the corpus; and corpora may hold texts.

    Args:
        settings (`Decontamination`): which repo, and how long the sequences are.
        limits (`VideoQuality`): bounds for decoding; a benchmark video beyond them cannot be in the data either.

    Raises:
        RecipeError: there is no such repo, or it is no benchmark.
    """
    try:
        names = datasets.get_dataset_config_names(settings.benchmark)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:160]
        raise RecipeError(f"decontamination.benchmark: no dataset {settings.benchmark} ({problem})") from error
    signatures, texts = {}, set()
    sides = [name for name in names if name.endswith(("-queries", "-corpus"))]
    if not sides:
        raise RecipeError(
            f"decontamination.benchmark: {settings.benchmark} has no <key>-queries and <key>-corpus, as UVRB has"
        )
    for name in sides:
        for row in _rows(settings.benchmark, name):
            texts |= ngrams(row.get("text") or "", settings.ngram)
            if row.get("video") is not None:
                try:
                    bits = signature(look_at(row["video"]["bytes"] or row["video"]["path"], limits))
                except FootageError:
                    continue
                signatures[f"{name}/{row['id']}"] = np.frombuffer(bits.tobytes(), np.uint8)
    return signatures, frozenset(texts)


def _rows(repo, name):
    table = datasets.load_dataset(repo, name, split="test")
    table = table.select_columns([column for column in ("id", "text", "video") if column in table.column_names])
    return table.cast_column("video", datasets.Video(decode=False)) if "video" in table.column_names else table


def text_overlap(text, benchmark_ngrams, n):
    """Share of the text's `n`-word sequences that occur in the benchmark, 0 to 1."""
    own = ngrams(text, n)
    return len(own & benchmark_ngrams) / len(own) if own else 0.0
