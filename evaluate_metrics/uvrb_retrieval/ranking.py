"""Retrieval metrics with binary relevance, from ranked ids or from embeddings. Needs NumPy only.

Every metric here follows from one thing: the ranks at which a query's relevant documents stand. So both doors,
`ranks_from_ids` and `ranks_from_embeddings`, return ranks (1 = first, inf = not retrieved) and `scores_by_query` does
the rest. Axes: Q queries, N documents, D embedding dimension, P pairs of a query and one of its relevant documents.

Rules for embeddings:

- the score is the cosine, computed in float64 and rounded to 9 decimals, so that equal vectors score equally wherever
  they stand; a tie goes to the document that comes first in the corpus, also among a query's own candidates;
- a row that is all zeros, or holds NaN or an infinity, has no cosine. Such a document is never retrieved, and such a
  query misses all its relevant documents; both still count in every mean;
- ranks and top-k are exact and need no similarity matrix: a float32 product of a block, whose error is bounded,
  decides wherever it can, and the few pairs that it cannot tell apart are computed in float64. Memory beyond the
  inputs is a few blocks, whatever Q and N are.
"""

import math
from collections import Counter

import numpy as np


DECIMALS = 9  # float32 embeddings resolve a cosine to some 1e-8; float64 sums agree to 1e-14 in any order
FAST_WIDTH = 256  # dimensions that one float32 product adds up: a shorter sum has a smaller error
ROUNDING = 2.0**-24  # of one float32 operation, relative
QUERY_BLOCK = 2048
EXACT_PAIRS = 512  # pairs in float64 at a time: 15 MB a side for D = 3584


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
    flat, owner = np.concatenate(ranks).astype(np.float64), np.repeat(np.arange(len(counts)), counts)
    flat = flat[np.lexsort((flat, owner))]
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
        block_size (`int`): documents compared at a time.

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
    cosines = _Cosines(queries, corpus)
    if candidates is None:
        return _rank_corpus(cosines, relevant, block_size)
    listed = _columns(candidates, query_ids, column_of, "candidate")
    return [_rank_candidates(cosines, row, *lists) for row, lists in enumerate(zip(relevant, listed))]


def top_k(query_embeddings, corpus_embeddings, k, candidates=None, block_size=512):
    """The k best documents of each query by cosine, exactly, by the rules at the top of this file.

    Args:
        query_embeddings (`numpy.ndarray` or `torch.Tensor` of shape `(Q, D)`): of any length, any float type.
        corpus_embeddings (the same, of shape `(N, D)`): one row a document.
        k (`int`): how many; N at most.
        candidates (list of Q sequences of `int`, *optional*): the corpus rows that each query ranks; all by default.
        block_size (`int`): documents compared at a time.

    Returns:
        `(numpy.ndarray of int64, numpy.ndarray of float64)`, both of shape `(Q, min(k, N))`: corpus rows, best first,
        and their cosines; -1 and -inf where fewer documents have a cosine or are candidates.

    Raises:
        ValueError: shapes that do not fit together, or a `k` below 1.

    >>> columns, scores = top_k([[1.0, 0.0]], [[0.0, 1.0], [3.0, 4.0], [2.0, 0.0]], k=2)
    >>> columns.tolist(), scores.tolist()
    ([[2, 1]], [[1.0, 0.6]])
    """
    queries, corpus = _matrix(query_embeddings, "query"), _matrix(corpus_embeddings, "corpus")
    _check_fit(queries, corpus, range(len(queries)), range(len(corpus)))
    (k,) = check_cutoffs(k)
    k, cosines = min(k, len(corpus)), _Cosines(queries, corpus)
    best_columns = np.full((len(queries), k), -1)
    best_scores = np.full((len(queries), k), -math.inf)
    if candidates is None:
        for start in range(0, len(queries), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            _update_best(cosines, np.arange(len(queries))[part], best_columns[part], best_scores[part], block_size)
        return best_columns, best_scores
    if len(candidates) != len(queries):
        raise ValueError(f"{len(candidates)} lists of candidates for {len(queries)} queries; give one a query.")
    for row, listed in enumerate(candidates):
        columns = np.unique(np.asarray(listed, dtype=np.int64))
        scores = cosines.exact(np.full(len(columns), row), columns)
        order = np.argsort(-scores, kind="stable")[: min(k, np.isfinite(scores).sum())]
        best_columns[row, : len(order)], best_scores[row, : len(order)] = columns[order], scores[order]
    return best_columns, best_scores


def bootstrap_intervals(scores, n_resamples=1000, confidence_level=0.95, seed=42):
    """Percentile bootstrap of the mean over queries; all metrics share the resamples.

    Args:
        scores (`dict[str, numpy.ndarray of shape (Q,)]`): as `scores_by_query` returns them.
        n_resamples (`int`): draws of Q queries with replacement.
        confidence_level (`float`): between 0 and 1.
        seed (`int`): of the draws; the same seed gives the same intervals.

    Returns:
        `dict[str, tuple[float, float]]`: both ends of the interval by metric.

    Raises:
        ValueError: a setting is out of range.

    >>> bootstrap_intervals({"recall@1": np.ones(5)}, n_resamples=10)
    {'recall@1': (1.0, 1.0)}
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; give a whole number from 1.")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level is {confidence_level}; give a number between 0 and 1, such as 0.95.")
    values = np.stack(list(scores.values()), axis=1)
    n_queries, rng = len(values), np.random.default_rng(seed)
    draws = (rng.integers(n_queries, size=n_queries) for _ in range(n_resamples))
    means = np.stack([np.bincount(draw, minlength=n_queries) @ values / n_queries for draw in draws])
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return {name: (float(low[place]), float(high[place])) for place, name in enumerate(scores)}


def unusable_rows(embeddings, block_size=512):
    """Which rows have no cosine (all zeros, NaN or infinite), as `numpy.ndarray` of `bool`, shape `(N,)`."""
    largest, _ = _extents(_matrix(embeddings, "given"), block_size)
    return largest == 0


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


class _Cosines:
    """Cosines of Q queries and N documents: fast ones with a bound on their error, and exact ones for some pairs.

    Attributes:
        margin (`float`): a fast cosine differs from the exact one by less. Any order of adding n products of unit
            vectors errs by n `ROUNDING` at most (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1);
            adding the parts up, scaling the rows and comparing account for the rest.
    """

    def __init__(self, queries, corpus):
        self._sides = [(side, *_extents(side)) for side in (queries, corpus)]
        parts = -(-queries.shape[1] // FAST_WIDTH)
        self.margin = (min(queries.shape[1], FAST_WIDTH) + parts + 16) * ROUNDING

    @property
    def n_documents(self):
        return len(self._sides[1][0])

    def fast_queries(self, rows):
        """Unit vectors of these queries for `fast`, float32 of shape `(len(rows), D)`; unusable ones are zeros."""
        return self._unit(0, rows, np.float32)

    def fast(self, fast_queries, columns):
        """Cosines to within `margin`, float32 of shape `(len(fast_queries), len(columns))`; -inf without a cosine."""
        documents = self._unit(1, columns, np.float32)
        scores = np.zeros((len(fast_queries), len(documents)), dtype=np.float32)
        for start in range(0, documents.shape[1], FAST_WIDTH):
            part = slice(start, start + FAST_WIDTH)
            scores += fast_queries[:, part] @ documents[:, part].T
        scores[:, self._sides[1][1][columns] == 0] = -math.inf
        return scores

    def exact(self, rows, columns):
        """Rounded cosines of the pairs `(rows[i], columns[i])`, float64 of shape `(P,)`; -inf without a cosine."""
        scores = np.empty(len(rows))
        for start in range(0, len(rows), EXACT_PAIRS):
            part = slice(start, start + EXACT_PAIRS)
            pairs = (self._unit(0, rows[part], np.float64), self._unit(1, columns[part], np.float64))
            scores[part] = np.round(np.einsum("pd,pd->p", *pairs), DECIMALS)
        usable = (self._sides[0][1][rows] > 0) & (self._sides[1][1][columns] > 0)
        return np.where(usable, scores, -math.inf)

    def exact_within(self, rows, columns, mask):
        """`exact` of the pairs of `rows` and `columns` where the mask, of shape `(len(rows), len(columns))`, is set.

        Returns:
            three `numpy.ndarray` of shape `(P,)`: places in `rows`, places in `columns`, cosines.
        """
        row_places, column_places = np.nonzero(mask)
        if 32 * len(row_places) < mask.size:
            return row_places, column_places, self.exact(rows[row_places], columns[column_places])
        # A collapsed model leaves most pairs undecided: then the whole block is cheaper as one product.
        documents = self._unit(1, columns, np.float64).T
        scores = np.full(mask.shape, -math.inf)
        for start in range(0, len(rows), EXACT_PAIRS):
            part = slice(start, start + EXACT_PAIRS)
            scores[part] = np.round(self._unit(0, rows[part], np.float64) @ documents, DECIMALS)
        scores[self._sides[0][1][rows] == 0] = -math.inf
        scores[:, self._sides[1][1][columns] == 0] = -math.inf
        return row_places, column_places, scores[mask]

    def _unit(self, side, rows, dtype):
        matrix, largest, length = self._sides[side]
        largest, length = largest[rows][:, None], length[rows][:, None]
        # The largest component first: the float32 range holds what remains, wherever the input's own range ends.
        work = np.promote_types(matrix.dtype, dtype)
        unit = matrix[rows].astype(work, copy=False)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit /= largest.astype(work)
        unit = unit.astype(dtype, copy=False)
        unit /= length.astype(dtype)
        unit[largest[:, 0] == 0] = 0
        return unit


def _extents(matrix, block_size=512):
    """Each row's largest component, 0 where it has no cosine, and the length of the row divided by it, float64."""
    largest, length = np.zeros(len(matrix)), np.ones(len(matrix))
    for start in range(0, len(matrix), block_size):
        part = slice(start, start + block_size)
        rows = np.where(np.isfinite(matrix[part]).all(axis=1)[:, None], matrix[part], 0).astype(np.float64)
        largest[part] = np.abs(rows).max(axis=1, initial=0)
        rows /= np.where(largest[part] > 0, largest[part], 1)[:, None]  # keeps squares from overflowing or vanishing
        length[part] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return largest, np.where(largest > 0, length, 1)


def _rank_corpus(cosines, relevant, block_size):
    rows = np.repeat(np.arange(len(relevant)), [len(targets) for targets in relevant])
    targets = np.concatenate(relevant)
    parts = (slice(start, start + QUERY_BLOCK) for start in range(0, len(rows), QUERY_BLOCK))
    ranks = [_rank_pairs(cosines, rows[part], targets[part], block_size) for part in parts]
    ends = np.cumsum([len(targets) for targets in relevant])
    return np.split(np.concatenate(ranks), ends[:-1])


def _rank_pairs(cosines, rows, targets, block_size):
    """Rank of document `targets[i]` for query `rows[i]` among all, float64 of shape `(P,)`."""
    own = cosines.exact(rows, targets)
    queries = cosines.fast_queries(rows)
    fast_own = np.where(np.isfinite(own), own, 0).astype(np.float32)[:, None]
    ahead = np.zeros(len(rows))
    for start in range(0, cosines.n_documents, block_size):
        block = np.arange(start, min(start + block_size, cosines.n_documents))
        lead = cosines.fast(queries, block) - fast_own
        ahead += (lead > cosines.margin).sum(axis=1)
        pairs, places, scores = cosines.exact_within(rows, block, np.abs(lead) <= cosines.margin)
        columns = block[places]
        before = (scores > own[pairs]) | ((scores == own[pairs]) & (columns < targets[pairs]))
        ahead += np.bincount(pairs, before & (columns != targets[pairs]), minlength=len(rows))
    return np.where(np.isfinite(own), ahead + 1, math.inf)


def _rank_candidates(cosines, row, targets, columns):
    """Ranks of `targets` for one query among its own candidates, float64 of shape `(R,)`."""
    own = cosines.exact(np.full(len(targets), row), targets)[:, None]
    scores = cosines.exact(np.full(len(columns), row), columns)
    before = (scores > own) | ((scores == own) & (columns < targets[:, None]))
    ranks = (before & (columns != targets[:, None])).sum(axis=1) + 1.0
    return np.where(np.isfinite(own[:, 0]) & np.isin(targets, columns), ranks, math.inf)


def _update_best(cosines, rows, best_columns, best_scores, block_size):
    """Fills `best_columns` and `best_scores`, of shape `(len(rows), k)`, in place; a tie goes to the lower column."""
    k = best_columns.shape[1]
    queries = cosines.fast_queries(rows)
    for start in range(0, cosines.n_documents, block_size):
        block = np.arange(start, min(start + block_size, cosines.n_documents))
        scores = cosines.fast(queries, block)
        floor = best_scores[:, -1]  # what is below the k-th best so far, or the k-th best of this block, is out
        if len(block) > k:
            floor = np.maximum(floor, np.partition(scores, -k, axis=1)[:, -k] - cosines.margin)
        mask = (scores >= (floor - cosines.margin)[:, None]) & np.isfinite(scores)
        pairs, places, exact = cosines.exact_within(rows, block, mask)
        owners = np.concatenate([np.repeat(np.arange(len(rows)), k), pairs])
        columns = np.concatenate([best_columns.ravel(), block[places]])
        values = np.concatenate([best_scores.ravel(), exact])
        order = np.lexsort((columns, -values, owners))
        counts = np.bincount(owners, minlength=len(rows))
        chosen = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
        best_columns[:], best_scores[:] = columns[chosen], values[chosen]


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
