"""Retrieval metrics with binary relevance, from ranked ids or from embeddings. Needs NumPy only.

Every metric here follows from one thing: the ranks at which a query's relevant documents stand. So both doors,
`ranks_from_ids` and `ranks_from_embeddings`, return ranks (1 = first, inf = not retrieved) and `scores_by_query` does
the rest. Axes: Q queries, N documents, D embedding dimension, P pairs of a query and one of its relevant documents.

Rules for embeddings:

- the score is the cosine, computed in float64 and rounded to 9 decimals, so that equal vectors score equally wherever
  they stand; a tie goes to the document that comes first in the corpus, also among a query's own candidates;
- a row that is all zeros, or holds NaN or an infinity, has no cosine. Such a document is never retrieved, and such a
  query misses all its relevant documents; both still count in every mean;
- the ranks are exact and need no similarity matrix: a block of scores at a time is compared with the score of the
  relevant document, so memory beyond the inputs is a few blocks (90 MB were measured for D = 3584).
"""

import math
from collections import Counter

import numpy as np


DECIMALS = 9  # float32 embeddings resolve a cosine to some 1e-8; float64 sums agree to 1e-14 in any order


def scores_by_query(ranks, k=(1, 5, 10)):
    """All metrics, query by query.

    With R the number of a query's relevant documents and H_k how many of them stand within the first k:
    recall@k = H_k / R (a share of the relevant ones, not merely whether any was found), precision@k = H_k / k (also
    where fewer than k documents were ranked), mrr = 1 / rank of the first relevant one, map = mean over the R relevant
    ones of precision at their rank, ndcg@k = binary gains discounted by log2(rank + 1), over the best possible sum.
    A document that was not retrieved adds zero everywhere.

    Args:
        ranks (list of Q `numpy.ndarray` of shape `(R,)`): of the relevant documents; 1 = first, inf = not retrieved.
        k (`int` or sequence of `int`): cut-offs.

    Returns:
        `dict[str, numpy.ndarray of shape (Q,)]`: `recall@k`, `precision@k`, `ndcg@k` for every k, then `mrr`, `map`.

    Raises:
        ValueError: a cut-off below 1, no query, or a query without relevant documents.

    >>> scores = scores_by_query([np.array([1, 4]), np.array([np.inf])], k=2)
    >>> {name: values.tolist() for name, values in scores.items() if name != "ndcg@2"}
    {'recall@2': [0.5, 0.0], 'precision@2': [0.5, 0.0], 'mrr': [1.0, 0.0], 'map': [0.75, 0.0]}
    """
    cutoffs = check_cutoffs(k)
    counts = np.array([len(row) for row in ranks])
    if len(counts) == 0 or counts.min() == 0:
        raise ValueError("Every query needs a relevant document, and there must be at least one query.")
    flat = np.concatenate([np.sort(row) for row in ranks]).astype(np.float64)
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts) + 1  # 1..R within each query

    def total(values):
        return np.bincount(owner, values, minlength=len(counts))

    scores = {}
    for cutoff in cutoffs:
        within = flat <= cutoff
        ideal = np.cumsum(1 / np.log2(np.arange(1, min(cutoff, counts.max()) + 1) + 1))
        scores[f"recall@{cutoff}"] = total(within) / counts
        scores[f"precision@{cutoff}"] = total(within) / cutoff
        scores[f"ndcg@{cutoff}"] = total(within / np.log2(flat + 1)) / ideal[np.minimum(counts, cutoff) - 1]
    scores["mrr"] = total((place == 1) / flat)
    scores["map"] = total(place / flat) / counts
    return scores


def mean_scores(ranks, k=(1, 5, 10)):
    """`scores_by_query` averaged over queries, as `dict[str, float]`."""
    return {name: float(values.mean()) for name, values in scores_by_query(ranks, k).items()}


def ranks_from_ids(predictions, references):
    """Ranks of the relevant ids within ranked ids.

    Args:
        predictions (list of Q lists of ids): each best first; may be short, or empty.
        references (list of Q lists of ids): the relevant ones, in any order; repeats count once.

    Returns:
        list of Q `numpy.ndarray` of shape `(R,)`.

    Raises:
        ValueError: unequal lengths, an id ranked twice, or a query without relevant ids.

    >>> [row.tolist() for row in ranks_from_ids([["a", "b", "c"]], [["c", "x"]])]
    [[3.0, inf]]
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} rankings for {len(references)} references; give one of each a query.")
    ranks = []
    for row, (ranked, relevant) in enumerate(zip(predictions, references)):
        place = {document: rank for rank, document in enumerate(ranked, start=1)}
        if len(place) != len(ranked):
            raise ValueError(f"Query {row} ranks an id twice; keep each id's best place only.")
        if len(relevant) == 0:
            raise ValueError(f"Query {row} has no relevant id; leave it out.")
        ranks.append(np.array([place.get(document, math.inf) for document in dict.fromkeys(relevant)]))
    return ranks


def ranks_from_embeddings(
    query_embeddings, corpus_embeddings, query_ids, corpus_ids, references, candidates=None, block_size=512
):
    """Exact ranks of the relevant documents by cosine, by the rules at the top of this file.

    Args:
        query_embeddings (`numpy.ndarray` or `torch.Tensor` of shape `(Q, D)`): of any length, any float type.
        corpus_embeddings (the same, of shape `(N, D)`): one row a document.
        query_ids (list of Q ids): unique.
        corpus_ids (list of N ids): unique; their order decides ties.
        references (list of Q lists of corpus ids, or a dict of them by query id): the relevant ones.
        candidates (the same form, *optional*): what each query ranks; the whole corpus by default. A relevant document
            that is not among them counts as not retrieved.
        block_size (`int`): documents, and pairs, compared at a time.

    Returns:
        list of Q `numpy.ndarray` of shape `(R,)`.

    Raises:
        ValueError: shapes, ids or references that do not fit together; the message names the id.

    >>> ranks_from_embeddings([[1.0, 0.0]], [[0.0, 1.0], [3.0, 4.0], [2.0, 0.0]], ["q"], ["a", "b", "c"], [["b"]])
    [array([2.])]
    """
    queries, corpus = _matrix(query_embeddings, "query"), _matrix(corpus_embeddings, "corpus")
    _check_fit(queries, corpus, query_ids, corpus_ids)
    column_of = {document: column for column, document in enumerate(corpus_ids)}
    relevant = _columns(references, query_ids, column_of, "relevant")
    if candidates is None:
        return _rank_corpus(queries, corpus, relevant, block_size)
    listed = _columns(candidates, query_ids, column_of, "candidate")
    ranks = []
    for row, (targets, columns) in enumerate(zip(relevant, listed)):
        rank = _rank_pairs(queries, corpus, np.full(len(targets), row), targets, columns, block_size)
        ranks.append(np.where(np.isin(targets, columns), rank, math.inf))
    return ranks


def unusable_rows(embeddings, block_size=512):
    """Which rows have no cosine (all zeros, NaN or infinite), as `numpy.ndarray` of `bool`, shape `(N,)`."""
    matrix = _matrix(embeddings, "given")
    blocks = (matrix[start : start + block_size] for start in range(0, len(matrix), block_size))
    return np.concatenate([~_usable(block) for block in blocks] or [np.zeros(0, dtype=bool)])


def chance_level(metric, n_relevant, n_ranked):
    """Expected score of a random order: recall@k = k / n and precision@k = R / n, with k cut to n ranked documents.

    Args:
        metric (`str`): `recall@k` or `precision@k`.
        n_relevant (sequence of Q `int`): relevant documents among the ranked ones, R.
        n_ranked (sequence of Q `int`): documents that the query ranks, n: its candidates or the corpus.

    Returns:
        `float`: mean over queries.

    Raises:
        ValueError: another metric.

    >>> chance_level("recall@10", [1, 3], [200, 200]), chance_level("precision@1", [1, 3], [10, 10])
    (0.05, 0.2)
    """
    name, _, k = metric.partition("@")
    (cutoff,) = check_cutoffs(int(k) if k.isdigit() else 0)
    ranked = np.asarray(n_ranked, dtype=np.float64)
    found = np.minimum(cutoff, ranked) / ranked
    if name == "recall":
        return float(found.mean())
    if name == "precision":
        return float((found * np.asarray(n_relevant) / cutoff).mean())
    raise ValueError(f"No chance level for {metric!r}; ask for recall@k or precision@k.")


def check_cutoffs(k):
    """Cut-offs as a sorted list of distinct `int`; `ValueError` for anything but whole numbers from 1."""
    values = [k] if isinstance(k, (int, np.integer)) else list(k)
    if not values or any(not isinstance(value, (int, np.integer)) or value < 1 for value in values):
        raise ValueError(f"k is {k!r}; give one or more whole numbers from 1 upwards.")
    return sorted({int(value) for value in values})


def _rank_corpus(queries, corpus, relevant, block_size):
    rows = np.repeat(np.arange(len(relevant)), [len(targets) for targets in relevant])
    targets = np.concatenate(relevant)
    columns = np.arange(len(corpus))
    ranks = [
        _rank_pairs(queries, corpus, rows[part], targets[part], columns, block_size)
        for part in (slice(start, start + block_size) for start in range(0, len(rows), block_size))
    ]
    ends = np.cumsum([len(targets) for targets in relevant])
    return np.split(np.concatenate(ranks), ends[:-1])


def _rank_pairs(queries, corpus, rows, targets, columns, block_size):
    """Rank of document `targets[i]` for query `rows[i]` among `columns`, float64 of shape `(P,)`."""
    left, right = _unit(queries[rows]), _unit(corpus[targets])
    own = np.round((left * right).sum(axis=1), DECIMALS)[:, None]
    ahead = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(columns), block_size):
        block = columns[start : start + block_size]
        documents = corpus[block]
        scores = np.round(left @ _unit(documents).T, DECIMALS)
        scores[:, ~_usable(documents)] = -math.inf
        before = (scores > own) | ((scores == own) & (block < targets[:, None]))
        ahead += (before & (block != targets[:, None])).sum(axis=1)
    usable = _usable(queries[rows]) & _usable(corpus[targets])
    return np.where(usable, ahead + 1.0, math.inf)


def _usable(rows):
    finite = np.isfinite(rows).all(axis=1)
    return finite & (rows != 0).any(axis=1)


def _unit(rows):
    """Rows of length 1 in float64; unusable ones become zeros."""
    rows = np.where(_usable(rows)[:, None], rows, 0).astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows /= np.where(largest > 0, largest, 1)  # keeps the squares below from overflowing or vanishing
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return rows / np.where(length > 0, length, 1)


def _matrix(embeddings, side):
    if hasattr(embeddings, "detach"):  # a torch tensor, whose bfloat16 NumPy does not know
        embeddings = embeddings.detach().cpu().float().numpy()
    matrix = np.asarray(embeddings)
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise ValueError(f"The {side} embeddings are {matrix.dtype} of shape {matrix.shape}; give numbers, (rows, D).")
    return matrix


def _check_fit(queries, corpus, query_ids, corpus_ids):
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"Queries have {queries.shape[1]} dimensions and documents {corpus.shape[1]}; use one model.")
    for side, matrix, ids in (("query", queries, query_ids), ("corpus", corpus, corpus_ids)):
        if len(matrix) != len(ids):
            raise ValueError(f"{len(matrix)} {side} embeddings for {len(ids)} {side} ids; give one id a row.")
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise ValueError(f"The {side} id {twice[0]!r} stands twice; ids must be unique.")
        if len(ids) == 0:
            raise ValueError(f"The {side} side is empty; give at least one row.")


def _columns(lists, query_ids, column_of, kind):
    """Each query's corpus columns, sorted and distinct, as a list of `numpy.ndarray` of `int`."""
    if hasattr(lists, "keys"):
        missing = [name for name in query_ids if name not in lists]
        if missing:
            raise ValueError(f"Query {missing[0]!r} has no list of {kind} ids; add it, or leave the query out.")
        lists = [lists[name] for name in query_ids]
    if len(lists) != len(query_ids):
        raise ValueError(f"{len(lists)} lists of {kind} ids for {len(query_ids)} queries; give one a query.")
    columns = []
    for name, ids in zip(query_ids, lists):
        unknown = [document for document in ids if document not in column_of]
        if unknown:
            raise ValueError(f"Query {name!r}: {kind} id {unknown[0]!r} is not in the corpus; add it or drop it.")
        if len(ids) == 0:
            raise ValueError(f"Query {name!r} has no {kind} id; leave the query out.")
        columns.append(np.unique([column_of[document] for document in ids]))
    return columns
