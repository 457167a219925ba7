"""What must not be in training data: the benchmark's videos and texts."""

from functools import lru_cache

import datasets
import numpy as np

from dataset_builders.synflow.footage import FootageError, look_at, signature
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.texts import ngrams


@lru_cache(maxsize=2)
def load_benchmark(settings, limits):
    """Signatures `{config/id: (128,) uint8}` of a UVRB repo's corpora and all word sequences of its queries.

    Args:
        settings (`Decontamination`): which repo, and how long the sequences are.
        limits (`VideoQuality`): bounds for decoding; a benchmark video beyond them cannot be in the data either.

    Raises:
        RecipeError: there is no such repo.
    """
    try:
        names = datasets.get_dataset_config_names(settings.benchmark)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:160]
        raise RecipeError(f"decontamination.benchmark: no dataset {settings.benchmark} ({problem})") from error
    signatures, texts = {}, set()
    for name in names:
        if name.endswith("-queries"):
            for text in _rows(settings.benchmark, name, ("text",))["text"]:
                if text:
                    texts |= ngrams(text, settings.ngram)
        elif name.endswith("-corpus"):
            for row in _rows(settings.benchmark, name, ("id", "video")):
                if row["video"] is not None:
                    try:
                        bits = signature(look_at(row["video"]["bytes"] or row["video"]["path"], limits))
                    except FootageError:
                        continue
                    signatures[f"{name}/{row['id']}"] = np.frombuffer(bits.tobytes(), np.uint8)
    return signatures, frozenset(texts)


def _rows(repo, name, columns):
    table = datasets.load_dataset(repo, name, split="test").select_columns(columns)
    return table.cast_column("video", datasets.Video(decode=False)) if "video" in columns else table


def text_overlap(text, benchmark_ngrams, n):
    """Share of the text's `n`-word sequences that occur in the benchmark, 0 to 1."""
    own = ngrams(text, n)
    return len(own & benchmark_ngrams) / len(own) if own else 0.0
