"""What the 16 scores do not tell: naming a video's class, and telling a clip from its own reversal."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np

from dataset_builders.uvrb.tasks import Task
from evaluate_metrics.retrieval_data import RetrievalData, Side, UvrbError, first_line, undecoded
from evaluate_metrics.uvrb_retrieval.ranking import DECIMALS, bootstrap_intervals
from modeling_gve.video_gve import VideoFrames, load_video


# Not in the paper: it names no instruction for classification.
CLASSIFICATION_INSTRUCTION = "Find the label of the action in the video."


def load_classification(repo):
    """A labelled set of videos as video-to-label retrieval (the paper's table 11): accuracy is recall@1 among labels.

    Args:
        repo (`str`): a folder or dataset repo whose split `test` has a column `video` and a column `label`, either
            class labels or strings; underscores of a label become spaces. Its name is the dataset's key.

    Returns:
        `RetrievalData`: the videos as queries, the L distinct labels as corpus, in the order of their names.

    Raises:
        UvrbError: it cannot be read, or lacks a column.
    """
    key = Path(repo).name
    try:
        rows = datasets.load_dataset(repo, split="test")
    except Exception as error:  # datasets and the Hub client raise a dozen kinds here
        raise UvrbError(f"No classification set at {repo}: {first_line(error)}") from error
    missing = [name for name in ("video", "label") if name not in rows.column_names]
    if missing or not len(rows):
        raise UvrbError(
            f"The classification set at {repo} lacks {' and '.join(missing) or 'rows'}; give video and label."
        )
    labels = rows["label"]
    if isinstance(rows.features["label"], datasets.ClassLabel):
        names = rows.features["label"].names
        labels = [names[label] for label in labels]
    ids = [f"{place}" for place in range(len(rows))]
    names = sorted(set(labels))
    queries = undecoded(rows.select_columns(["video"]).add_column("id", ids))
    corpus = datasets.Dataset.from_dict({"id": names, "text": [name.replace("_", " ") for name in names]})
    task = Task(
        *(key, key, "", "", "", "video", "recall@1", len(ids), len(names), 0.0, None, repo, "video"),
        CLASSIFICATION_INSTRUCTION,
    )
    return RetrievalData(task, Side(corpus), Side(queries), {name: [label] for name, label in zip(ids, labels)})


@dataclass
class Clips(Side):
    """Videos of a corpus as their uniform frames in playing or in reverse order; the clock runs forward in both.

    Args:
        reverse (`bool`): play them backwards.
        num_frames (`int`): frames of each.
    """

    reverse: bool = field(kw_only=True)
    num_frames: int = field(kw_only=True)

    @cached_property
    def digests(self) -> list[str]:
        kind = f"{'reversed' if self.reverse else 'forward'} {self.num_frames} "
        return [hashlib.sha256((kind + digest).encode()).hexdigest() for digest in super().digests]

    def items(self, indices):
        for item in super().items(indices):
            try:
                video = load_video(item["video"], self.num_frames)
            except ValueError:
                yield item  # the encoder says what is wrong with it
                continue
            yield {"video": reverse_frames(video) if self.reverse else video}


def reverse_frames(video):
    """A `VideoFrames` played backwards: the frames in reverse at the times that time's reversal gives them."""
    return VideoFrames(video.frames[::-1].copy(), (video.times[0] + video.times[-1] - video.times)[::-1].copy())


def clip_sides(data, num_frames):
    """The first relevant video of each query, forward and reversed, as two `Clips`, and each query's row in them."""
    row_of = {name: row for row, name in enumerate(data.corpus.ids)}
    wanted = [row_of[data.relevant[name][0]] for name in data.queries.ids]
    rows = sorted(set(wanted))
    clips = data.corpus.rows.select(rows)
    place = {row: position for position, row in enumerate(rows)}
    sides = [Clips(clips, reverse=reverse, num_frames=num_frames) for reverse in (False, True)]
    return *sides, np.array([place[row] for row in wanted])


def score_reverse_time(queries, forward, reversed_, rows):
    """Does a query prefer its clip over the clip's own reversal?

    Args:
        queries (`numpy.ndarray` of shape `(Q, D)`): query embeddings.
        forward, reversed_ (`numpy.ndarray` of shape `(C, D)`): embeddings of the clips, and of their reversals.
        rows (`numpy.ndarray` of shape `(Q,)`): each query's clip.

    Returns:
        `dict`: `preferred`, the share of queries whose cosine with the clip is higher, a tie counting half (chance is
        0.5), its bootstrap `interval`, `mean_margin` (cosine with the clip less that with its reversal), `n_queries`,
        and `n_skipped`, queries left out because a vector is missing.

    Raises:
        UvrbError: no query is left.
    """
    cosines = [_cosines(queries, clips[rows]) for clips in (forward, reversed_)]
    known = np.isfinite(cosines[0]) & np.isfinite(cosines[1])
    if not known.any():
        raise UvrbError("No query of the reverse-time diagnostic has an embedding of itself and of its clip.")
    margins = cosines[0][known] - cosines[1][known]
    wins = (np.sign(np.round(margins, DECIMALS)) + 1) / 2
    return {
        "preferred": float(wins.mean()),
        "interval": list(bootstrap_intervals({"wins": wins})["wins"]),
        "mean_margin": float(margins.mean()),
        "n_queries": int(known.sum()),
        "n_skipped": int((~known).sum()),
    }


def _cosines(left, right):
    left, right = left.astype(np.float64), right.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return (left * right).sum(axis=1) / lengths
