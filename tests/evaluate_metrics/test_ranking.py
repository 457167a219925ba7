"""Retrieval metrics: closed forms, brute force, chance, ties, rows without a cosine, and every message."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from evaluate_metrics.uvrb_retrieval import ranking
from evaluate_metrics.uvrb_retrieval.ranking import (
    bootstrap_intervals,
    chance_level,
    check_cutoffs,
    mean_scores,
    ranks_from_embeddings,
    ranks_from_ids,
    scores_by_query,
    top_k,
    unusable_rows,
)


def names(prefix, count):
    return [f"{prefix}{place}" for place in range(count)]


def brute_force(queries, corpus, relevant, candidates=None):
    """Ranks by sorting the full similarity matrix, ties by corpus order."""
    unit = [side / np.linalg.norm(side.astype(np.float64), axis=1, keepdims=True) for side in (queries, corpus)]
    ranks = []
    for row, scores in enumerate(np.round(unit[0] @ unit[1].T, 9)):
        columns = range(len(corpus)) if candidates is None else sorted(set(candidates[row]))
        order = sorted(columns, key=lambda column: (-scores[column], column))
        ranks.append([order.index(column) + 1 if column in order else math.inf for column in sorted(relevant[row])])
    return ranks


def by_name(lists):
    return [[f"v{column}" for column in columns] for columns in lists]


@pytest.fixture
def world():
    """70 queries with 1 to 3 relevant documents among 150, some of them twins that tie exactly."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((70, 16)).astype(np.float32)
    corpus = rng.standard_normal((150, 16)).astype(np.float32)
    corpus[100:130] = corpus[20:50] * 4  # a power of two: the same direction to the last bit
    relevant = [rng.choice(150, size=rng.integers(1, 4), replace=False).tolist() for _ in range(70)]
    return queries, corpus, relevant


@pytest.mark.parametrize("block_size", [1, 7, 64, 512])
def test_blocks_equal_brute_force(world, block_size):
    queries, corpus, relevant = world
    ranks = ranks_from_embeddings(
        queries, corpus, names("q", 70), names("v", 150), by_name(relevant), block_size=block_size
    )
    assert [row.tolist() for row in ranks] == brute_force(queries, corpus, relevant)


@pytest.mark.parametrize("block_size", [3, 512])
def test_candidates_equal_brute_force(world, block_size):
    queries, corpus, relevant = world
    rng = np.random.default_rng(1)
    candidates = [rng.permutation([*rng.choice(150, size=10, replace=False), *row[:1]]).tolist() for row in relevant]
    ranks = ranks_from_embeddings(
        *(queries, corpus, names("q", 70), names("v", 150), by_name(relevant), by_name(candidates)),
        block_size=block_size,
    )
    assert [row.tolist() for row in ranks] == brute_force(queries, corpus, relevant, candidates)


def test_all_candidates_equal_the_corpus(world):
    queries, corpus, relevant = world
    ids = (names("q", 70), names("v", 150), by_name(relevant))
    everything = [names("v", 150)] * 70
    whole = ranks_from_embeddings(queries, corpus, *ids)
    listed = ranks_from_embeddings(queries, corpus, *ids, everything)
    assert all(np.array_equal(one, other) for one, other in zip(whole, listed))


def test_embeddings_equal_ranked_ids(world):
    queries, corpus, relevant = world
    ids = names("v", 150)
    unit = corpus / np.linalg.norm(corpus.astype(np.float64), axis=1, keepdims=True)
    order = np.argsort(-np.round(queries @ unit.T, 6), axis=1, kind="stable")
    ranked = ranks_from_ids([[ids[column] for column in row] for row in order], by_name(relevant))
    embedded = ranks_from_embeddings(queries, corpus, names("q", 70), ids, by_name(relevant))
    assert mean_scores(ranked) == pytest.approx(mean_scores(embedded), abs=1e-12)


def test_length_and_container_of_embeddings_do_not_matter(world):
    queries, corpus, relevant = world
    ids = (names("q", 70), names("v", 150))
    plain = ranks_from_embeddings(queries, corpus, *ids, by_name(relevant))
    references = dict(zip(ids[0], by_name(relevant)))
    scaled = ranks_from_embeddings(torch.from_numpy(queries) * 8, torch.from_numpy(corpus) * 2**-40, *ids, references)
    assert all(np.array_equal(one, other) for one, other in zip(plain, scaled))
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    assert ranks_from_embeddings(half[:1], half, ["q"], ["a", "b"], [["b"]])[0].tolist() == [2.0]


def test_huge_and_tiny_vectors_keep_their_direction():
    queries = np.array([[1e30, 0], [0, 1e-30]], dtype=np.float32)
    corpus = np.array([[1e-38, 1e-38], [1e38, 0], [0, 1e38]], dtype=np.float32)
    ranks = ranks_from_embeddings(queries, corpus, ["a", "b"], ["x", "y", "z"], [["y"], ["z"]])
    assert [row.tolist() for row in ranks] == [[1.0], [1.0]]


def test_ties_go_to_the_earlier_document():
    corpus = np.ones((5, 3))
    ranks = ranks_from_embeddings(
        np.ones((5, 3)), corpus, names("q", 5), names("v", 5), by_name([[i] for i in range(5)])
    )
    assert [row.tolist() for row in ranks] == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    listed = [["v4", "v2"]]  # the order of candidates decides nothing
    assert ranks_from_embeddings(corpus[:1], corpus, ["q"], names("v", 5), [["v4"]], listed)[0].tolist() == [2.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_without_a_cosine_count_as_misses(bad):
    queries = np.array([[1.0, 0.0], [1.0, 0.0], [bad, bad]])
    corpus = np.array([[0.1, 1.0], [bad, bad], [1.0, 0.0]])
    ids = (["a", "b", "c"], ["x", "y", "z"])
    ranks = ranks_from_embeddings(queries, corpus, *ids, [["x"], ["y"], ["z"]])
    assert [row.tolist() for row in ranks] == [[2.0], [math.inf], [math.inf]]
    assert mean_scores(ranks, 2)["recall@2"] == pytest.approx(1 / 3)
    assert unusable_rows(corpus).tolist() == [False, True, False]


def test_closed_forms_of_one_relevant_document():
    """Rank r: recall@k = [r <= k], precision = recall / k, ndcg = [r <= k] / log2(r + 1), mrr = map = 1 / r."""
    ranks = np.array([1, 2, 5, 11, math.inf])
    scores = scores_by_query([np.array([rank]) for rank in ranks], k=[1, 5, 10])
    for k in (1, 5, 10):
        assert scores[f"recall@{k}"].tolist() == (ranks <= k).tolist()
        assert scores[f"precision@{k}"] == pytest.approx((ranks <= k) / k)
        assert scores[f"ndcg@{k}"] == pytest.approx((ranks <= k) / np.log2(ranks + 1))
    assert scores["mrr"] == pytest.approx(1 / ranks)
    assert scores["map"] == pytest.approx(1 / ranks)


def test_hand_worked_example_with_three_relevant_documents():
    """Found at 1 and 4, the third never."""
    scores = mean_scores(ranks_from_ids([["a", "x", "y", "b"]], [["b", "a", "c"]]), [2, 4])
    best = 1 + 1 / math.log2(3) + 1 / 2
    assert scores == pytest.approx(
        {
            "recall@2": 1 / 3,
            "precision@2": 1 / 2,
            "ndcg@2": 1 / (1 + 1 / math.log2(3)),
            "recall@4": 2 / 3,
            "precision@4": 1 / 2,
            "ndcg@4": (1 + 1 / math.log2(5)) / best,
            "mrr": 1.0,
            "map": (1 + 2 / 4) / 3,
        }
    )


def test_a_perfect_ranking_scores_one_and_the_order_of_queries_is_kept():
    scores = scores_by_query(ranks_from_ids([["a", "b"], ["b", "a"]], [["b", "a"], ["a"]]), 2)
    assert scores["ndcg@2"].tolist() == pytest.approx([1.0, 1 / math.log2(3)])
    assert scores["map"].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("door", ["ids", "embeddings"])
def test_equal_to_trec_eval(door):
    """Random runs without ties: 40 queries with 1 to 5 relevant among 60 documents, at several cut-offs."""
    trec = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(2)
    ids, queries = names("v", 60), names("q", 40)
    left, right = rng.standard_normal((40, 8)), rng.standard_normal((60, 8))
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right)]
    run = {name: dict(zip(ids, map(float, scores))) for name, scores in zip(queries, unit[0] @ unit[1].T)}
    qrels = {name: dict.fromkeys(rng.choice(ids, size=rng.integers(1, 6), replace=False), 1) for name in queries}
    relevant = [list(qrels[name]) for name in queries]
    if door == "ids":
        ranks = ranks_from_ids([sorted(run[name], key=run[name].get, reverse=True) for name in queries], relevant)
    else:
        ranks = ranks_from_embeddings(left, right, queries, ids, relevant)
    ours = scores_by_query(ranks, [1, 5, 10])
    measures = {"mrr": "recip_rank", "map": "map"}
    for k in (1, 5, 10):
        measures |= {f"recall@{k}": f"recall_{k}", f"precision@{k}": f"P_{k}", f"ndcg@{k}": f"ndcg_cut_{k}"}
    theirs = trec.RelevanceEvaluator(qrels, {"recall.1,5,10", "P.1,5,10", "ndcg_cut.1,5,10", "recip_rank", "map"})
    theirs = theirs.evaluate(run)
    for name, other in measures.items():
        assert ours[name].tolist() == pytest.approx([theirs[query][other] for query in queries], abs=1e-9)


def brute_top(queries, corpus, k, candidates=None):
    unit = [side / np.linalg.norm(side.astype(np.float64), axis=1, keepdims=True) for side in (queries, corpus)]
    columns = [range(len(corpus))] * len(queries) if candidates is None else candidates
    scores = np.round(unit[0] @ unit[1].T, 9)
    return [sorted(set(listed), key=lambda c, r=row: (-scores[r, c], c))[:k] for row, listed in enumerate(columns)]


@pytest.mark.parametrize(("k", "block_size"), [(1, 7), (10, 7), (10, 64), (149, 512), (400, 64)])
def test_top_k_equals_brute_force(world, k, block_size):
    queries, corpus, _ = world
    columns, scores = top_k(queries, corpus, k, block_size=block_size)
    assert columns.tolist() == brute_top(queries, corpus, k)
    assert (np.diff(scores, axis=1) <= 0).all() and np.isfinite(scores).all()


def test_top_k_among_candidates_and_without_a_cosine(world):
    queries, corpus, _ = world
    rng = np.random.default_rng(4)
    candidates = [rng.choice(150, size=9, replace=False) for _ in queries]
    columns, _ = top_k(queries, corpus, 9, candidates)
    assert columns.tolist() == brute_top(queries, corpus, 9, [listed.tolist() for listed in candidates])
    broken = corpus[:6].copy()
    broken[[1, 4]] = np.nan
    queries = queries[:2].copy()
    queries[1] = 0
    for listed in (None, [range(6)] * 2):
        columns, scores = top_k(queries, broken, 5, listed)
        assert sorted(columns[0].tolist()) == [-1, 0, 2, 3, 5] and columns[0, -1] == -1
        assert columns[1].tolist() == [-1] * 5 and np.isneginf(scores[1]).all()
    with pytest.raises(ValueError, match="1 lists of candidates for 2 queries"):
        top_k(queries, broken, 5, [[0]])


@pytest.mark.parametrize("n_close", [5, 120])
def test_what_float32_cannot_tell_apart_is_decided_in_float64(n_close):
    """Documents whose cosines differ by 4e-9, few of them or nearly all: float32 resolves 6e-8."""
    rng = np.random.default_rng(5)
    angles = np.concatenate([0.5 + 8e-9 * rng.permutation(n_close), rng.uniform(0.6, 1.5, 128 - n_close)])
    corpus = np.stack([np.cos(angles), np.sin(angles), *np.zeros((6, 128))], axis=1)
    turn, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    query, corpus = np.eye(8)[:1] @ turn, corpus @ turn
    order = np.argsort(angles[:n_close])
    ids = names("v", 128)
    ranks = ranks_from_embeddings(query, corpus, ["q"], ids, [[ids[c] for c in range(n_close)]], block_size=32)
    assert ranks[0][order].tolist() == list(range(1, n_close + 1))
    assert top_k(query, corpus, n_close, block_size=32)[0][0].tolist() == order.tolist()


@pytest.mark.parametrize("dimensions", [3, 256, 700])
def test_the_margin_bounds_the_error_of_float32(dimensions):
    """All terms positive, so that rounding errors do not cancel; the bound is not idle either."""
    rng = np.random.default_rng(6)
    left, right = rng.uniform(0.5, 1, (40, dimensions)), rng.uniform(0.5, 1, (50, dimensions))
    cosines = ranking._Cosines(left, right)
    fast = cosines.fast(cosines.fast_queries(np.arange(40)), np.arange(50)).astype(np.float64)
    rows, columns = np.indices((40, 50)).reshape(2, -1)
    error = np.abs(fast.ravel() - cosines.exact(rows, columns)).max()
    assert 1e-9 < error < cosines.margin < 2e-5


def test_bootstrap_of_hits_has_the_quantiles_of_the_binomial():
    """Resampling n queries of which a share p is found draws Binomial(n, p) / n."""
    n, hits = 50, 20
    mass = [math.comb(n, found) * (hits / n) ** found * (1 - hits / n) ** (n - found) for found in range(n + 1)]
    below = np.cumsum(mass)
    values = {"recall@1": np.repeat([1.0, 0.0], [hits, n - hits]), "mrr": np.linspace(0, 1, n)}
    intervals = bootstrap_intervals(values, n_resamples=3000, confidence_level=0.9)
    expected = [np.searchsorted(below, tail) / n for tail in (0.05, 0.95)]
    assert intervals["recall@1"] == pytest.approx(expected, abs=1.01 / n)
    low, high = intervals["mrr"]
    spread = 1.645 * values["mrr"].std() / math.sqrt(n)
    assert (low, high) == pytest.approx((0.5 - spread, 0.5 + spread), abs=0.01)
    assert bootstrap_intervals(values) == bootstrap_intervals(values) != bootstrap_intervals(values, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n_resamples": 0}, "n_resamples is 0"), ({"confidence_level": 95}, "confidence_level is 95; give a number")],
)
def test_bootstrap_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals({"mrr": np.ones(3)}, **settings)


@pytest.mark.parametrize("metric", ["recall@1", "recall@10", "precision@1", "precision@5"])
def test_random_vectors_score_chance(metric):
    """1,200 queries with 3 relevant documents among 40, within four standard errors of the closed form."""
    rng = np.random.default_rng(3)
    relevant = [rng.choice(40, size=3, replace=False) for _ in range(1200)]
    queries, corpus = rng.standard_normal((1200, 64)), rng.standard_normal((40, 64))
    ranks = ranks_from_embeddings(queries, corpus, names("q", 1200), names("v", 40), by_name(relevant))
    values = scores_by_query(ranks, int(metric.split("@")[1]))[metric]
    assert abs(values.mean() - chance_level(metric, [3] * 1200, [40] * 1200)) < 4 * values.std() / math.sqrt(1200)


def test_chance_level_closed_forms():
    assert chance_level("recall@10", [1, 5], [200, 200]) == 0.05
    assert chance_level("recall@10", [1], [4]) == 1.0  # a list shorter than k is found whole
    assert chance_level("precision@1", [1, 2], [10, 8]) == pytest.approx((0.1 + 0.25) / 2)
    with pytest.raises(ValueError, match="ndcg@10.*recall@k or precision@k"):
        chance_level("ndcg@10", [1], [4])


@pytest.mark.parametrize("k", [0, -1, [], [1, 0], [2.5], ["1"]])
def test_cutoffs_are_checked(k):
    with pytest.raises(ValueError, match="whole numbers from 1"):
        check_cutoffs(k)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([["a", "b", "a"]], [["a"]], "Query 0 ranks an id twice"),
        ([["a"]], [[]], "Query 0 has no relevant id"),
        ([["a"]], [["a"], ["b"]], "1 rankings for 2 references"),
    ],
)
def test_ids_that_do_not_fit_are_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        ranks_from_ids(predictions, references)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus_embeddings": np.ones((2, 3))}, "Queries have 2 dimensions and documents 3"),
        ({"query_embeddings": np.ones(2)}, r"query embeddings are float64 of shape \(2,\)"),
        ({"corpus_ids": ["a"]}, "2 corpus embeddings for 1 corpus ids"),
        ({"corpus_ids": ["a", "a"]}, "corpus id 'a' stands twice"),
        ({"references": [["nowhere"]]}, "Query 'q': relevant id 'nowhere' is not in the corpus"),
        ({"references": [[]]}, "Query 'q' has no relevant id"),
        ({"references": {"other": ["a"]}}, "Query 'q' has no list of relevant ids"),
        ({"references": [["a"], ["b"]]}, "2 lists of relevant ids for 1 queries"),
        ({"candidates": [["nowhere"]]}, "Query 'q': candidate id 'nowhere' is not in the corpus"),
        ({"query_embeddings": np.ones((0, 2)), "query_ids": [], "references": []}, "query side is empty"),
    ],
)
def test_embeddings_that_do_not_fit_are_named(changes, message):
    good = {
        "query_embeddings": np.ones((1, 2)),
        "corpus_embeddings": np.ones((2, 2)),
        "query_ids": ["q"],
        "corpus_ids": ["a", "b"],
        "references": [["a"]],
    }
    with pytest.raises(ValueError, match=message):
        ranks_from_embeddings(**{**good, **changes})


def test_no_similarity_matrix_is_built():
    """4,000 x 4,000 scores are 128 MB in float64; the blocks take a few."""
    rng = np.random.default_rng(4)
    queries, corpus = (rng.standard_normal((4000, 8), dtype=np.float32) for _ in range(2))
    ids = names("q", 4000), names("v", 4000), by_name([[row] for row in range(4000)])
    tracemalloc.start()
    ranks_from_embeddings(queries, corpus, *ids, block_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
