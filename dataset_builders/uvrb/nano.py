"""The nano flavour: 50 queries a dataset, and of each corpus the videos that are hardest to tell from the answers."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from dataset_builders.uvrb.duplicates import unpack
from dataset_builders.uvrb.video_files import NUM_FRAMES


N_QUERIES = 50
# Not in the paper: kept wrong videos a query; above the largest cut-off, so that recall@10 stays what it was.
N_DISTRACTORS = 20


def choose(dataset, prepared, scorer, seed=0, n_queries=N_QUERIES, n_distractors=N_DISTRACTORS):
    """A small version of a dataset that is as hard as the whole.

    A query keeps its answers and the wrong videos with the highest scores; all others' are distractors as well. With
    candidates, its whole list stays. So the scorer's own recall@k, k up to `n_distractors`, is that of the same
    queries on the whole corpus.

    Args:
        dataset (`Dataset`): whole.
        prepared (`dict[Media, Prepared]`): its files.
        scorer (callable): `scorer(dataset, queries, prepared)`, scores of shape `(Q, N)`.
        seed (`int`): of the choice of queries.
        n_queries (`int`): at most.
        n_distractors (`int`): at least, a query.

    Returns:
        `Dataset`
    """
    digest = hashlib.sha256(f"nano {seed} {dataset.task.key}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    size = min(n_queries, len(dataset.queries))
    queries = [dataset.queries[i] for i in sorted(rng.choice(len(dataset.queries), size, replace=False))]
    kept = {name for query in queries for name in dataset.relevant[query.id]}
    if dataset.candidates is not None:
        kept |= {name for query in queries for name in dataset.candidates[query.id]}
    else:
        ids = [item.id for item in dataset.corpus]
        for query, scores in zip(queries, scorer(dataset, queries, prepared)):
            answers = set(dataset.relevant[query.id])
            order = np.argsort(-scores, kind="stable")
            kept |= set([ids[i] for i in order if ids[i] not in answers][:n_distractors])
    chosen = {query.id for query in queries}
    return replace(
        dataset,
        queries=queries,
        corpus=[item for item in dataset.corpus if item.id in kept],
        relevant={name: ids for name, ids in dataset.relevant.items() if name in chosen},
        candidates=dataset.candidates and {name: dataset.candidates[name] for name in chosen},
    )


def score_by_hash(dataset, queries, prepared):
    """Without a model: how alike a video looks to the query's answers, by perceptual hash."""
    vectors = np.stack([unpack(prepared[item.video].hashes, NUM_FRAMES) for item in dataset.corpus])
    place = {item.id: i for i, item in enumerate(dataset.corpus)}
    return np.stack(
        [np.mean([vectors @ vectors[place[i]] for i in dataset.relevant[query.id]], axis=0) for query in queries]
    )


def score_by_model(path):
    """Scorer of a GVE repo (folder or Hub name): the cosines that retrieval ranks by. The repo's code is run."""
    model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()

    def scorer(dataset, queries, prepared):
        with torch.inference_mode():
            asked = [_model_input(query, prepared) for query in queries]
            left = model.encode(asked, instruction=dataset.task.instruction)
            right = model.encode([_model_input(item, prepared) for item in dataset.corpus])
        return (left.float() @ right.float().T).cpu().numpy()

    return scorer


def _model_input(item, prepared):
    parts = {"text": item.text}
    if item.image:
        parts["image"] = prepared[item.image].file
    if item.video:
        parts["video"] = {"bytes": Path(prepared[item.video].clip).read_bytes(), "path": None}
    return {name: value for name, value in parts.items() if value is not None}
