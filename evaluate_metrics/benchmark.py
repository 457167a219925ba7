"""Time and memory of `uvrb_retrieval` at the size of UVRB's largest dataset, beside others on the same ranking.

```bash
python -m evaluate_metrics.benchmark                                             # PEV-K's size, 3584 dimensions
python -m evaluate_metrics.benchmark --queries 500 --documents 600 --dimensions 64   # a quick look
```

First the exact metrics from embeddings: seconds, and memory at its peak over the inputs. Then the ranking of the first
`--depth` documents goes to every library that is installed (pytrec_eval, ranx, torchmetrics: extra `bench`), each
timed for building its own inputs from ids and scores and for judging them, with its largest difference from our means.
"""

import argparse
import importlib.util
import resource
import sys
import time

import numpy as np

from evaluate_metrics.uvrb_retrieval.ranking import mean_scores, ranks_from_embeddings, ranks_from_ids, top_k


CUTOFFS = (1, 10)
SIGNAL = 0.06  # of its own document in a query: enough to be found mostly, not always, at 3584 dimensions
BLOCK = 64  # small: what making the inputs takes would hide what the metrics take


def random_embeddings(n_queries, n_documents, n_dimensions, seed=42):
    """Float32 vectors of which query i leans towards document i, made without a second copy.

    Returns:
        two `numpy.ndarray` of shapes `(Q, D)` and `(N, D)`.
    """
    rng = np.random.default_rng(seed)
    queries, corpus = (np.empty((rows, n_dimensions), dtype=np.float32) for rows in (n_queries, n_documents))
    for side in (queries, corpus):
        for start in range(0, len(side), BLOCK):
            rng.standard_normal(out=side[start : start + BLOCK], dtype=np.float32)
    for start in range(0, n_queries, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n_queries))
        queries[rows] += SIGNAL * corpus[rows % n_documents]
    return queries, corpus


def peak_bytes():
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def timed(function, *arguments):
    """`(result, seconds)`."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


class Ours:
    """`ranks_from_ids` and the means."""

    name = "uvrb_retrieval"
    module = "numpy"

    def prepare(self, ranked, scores, relevant):
        return ranked, relevant

    def judge(self, ranked, relevant):
        return mean_scores(ranks_from_ids(ranked, relevant), CUTOFFS)


class PytrecEval:
    name = module = "pytrec_eval"

    def prepare(self, ranked, scores, relevant):
        run = {f"q{row}": dict(zip(ids, values)) for row, (ids, values) in enumerate(zip(ranked, scores))}
        return run, {f"q{row}": dict.fromkeys(ids, 1) for row, ids in enumerate(relevant)}

    def judge(self, run, qrels):
        import pytrec_eval

        cutoffs = ",".join(map(str, CUTOFFS))
        measures = {f"{name}.{cutoffs}" for name in ("recall", "P", "ndcg_cut")} | {"recip_rank", "map"}
        values = list(pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run).values())
        names = {"mrr": "recip_rank", "map": "map"}
        for k in CUTOFFS:
            names |= {f"recall@{k}": f"recall_{k}", f"precision@{k}": f"P_{k}", f"ndcg@{k}": f"ndcg_cut_{k}"}
        return {name: float(np.mean([value[other] for value in values])) for name, other in names.items()}


class Ranx:
    name = module = "ranx"

    def prepare(self, ranked, scores, relevant):
        import ranx

        run, qrels = PytrecEval().prepare(ranked, scores, relevant)
        return ranx.Qrels(qrels), ranx.Run(run)

    def judge(self, qrels, run):
        import ranx

        names = {"mrr": "mrr", "map": "map"}
        for k in CUTOFFS:
            names |= {f"{name}@{k}": f"{name}@{k}" for name in ("recall", "precision", "ndcg")}
        values = ranx.evaluate(qrels, run, list(names.values()), make_comparable=True)
        return {name: float(values[other]) for name, other in names.items()}


class Torchmetrics:
    """Agrees where each query has one relevant document: it knows of no relevant document outside the ranking."""

    name = module = "torchmetrics"

    def prepare(self, ranked, scores, relevant):
        import torch

        hits = np.array([[name in wanted for name in ids] for ids, wanted in zip(ranked, map(set, relevant))])
        owners = np.repeat(np.arange(len(ranked)), hits.shape[1])
        return torch.tensor(np.ravel(scores)), torch.tensor(hits.ravel()), torch.tensor(owners)

    def judge(self, scores, hits, owners):
        from torchmetrics import retrieval

        metrics = {"mrr": retrieval.RetrievalMRR(), "map": retrieval.RetrievalMAP()}
        for k in CUTOFFS:
            metrics[f"recall@{k}"] = retrieval.RetrievalRecall(top_k=k)
            metrics[f"precision@{k}"] = retrieval.RetrievalPrecision(top_k=k)
            metrics[f"ndcg@{k}"] = retrieval.RetrievalNormalizedDCG(top_k=k)
        return {name: float(metric(scores, hits, indexes=owners)) for name, metric in metrics.items()}


def compare(ranked, scores, relevant):
    """Rows `(name, seconds to prepare, seconds to judge, largest difference from ours)` of what is installed.

    Args:
        ranked (list of Q lists of `str`): the first documents of each query.
        scores (list of Q lists of `float`): theirs.
        relevant (list of Q lists of `str`): the relevant ones.
    """
    rows, ours = [], None
    for library in (Ours(), PytrecEval(), Ranx(), Torchmetrics()):
        if importlib.util.find_spec(library.module) is None:
            continue
        inputs, preparing = timed(library.prepare, ranked, scores, relevant)
        values, judging = timed(library.judge, *inputs)
        ours = ours or values
        rows.append((library.name, preparing, judging, max(abs(values[name] - ours[name]) for name in ours)))
    return rows


def main(words=None):
    parser = argparse.ArgumentParser(prog="evaluate_metrics.benchmark", description="Time and memory of the metrics.")
    parser.add_argument("--queries", type=int, default=14427, help="default: %(default)s, PEV-K's")
    parser.add_argument("--documents", type=int, default=15000, help="default: %(default)s, PEV-K's")
    parser.add_argument("--dimensions", type=int, default=3584, help="default: %(default)s, GVE-7B's")
    parser.add_argument(
        "--depth", type=int, default=10, help="of the ranking that the libraries judge (default: %(default)s)"
    )
    words = parser.parse_args(words)
    queries, corpus = random_embeddings(words.queries, words.documents, words.dimensions)
    ids = [f"q{row}" for row in range(len(queries))], [f"v{row}" for row in range(len(corpus))]
    relevant = [[ids[1][row % len(corpus)]] for row in range(len(queries))]
    print(f"{len(queries)} queries, {len(corpus)} documents, {words.dimensions} dimensions, float32, random")
    before = peak_bytes()
    ranks, seconds = timed(ranks_from_embeddings, queries, corpus, *ids, relevant)
    exact = mean_scores(ranks, CUTOFFS)
    print(f"exact metrics from embeddings: {seconds:.1f} s, {(peak_bytes() - before) / 1e6:.0f} MB over the inputs")
    print(", ".join(f"{name} {value:.4f}" for name, value in exact.items()))
    (columns, scores), seconds = timed(top_k, queries, corpus, words.depth)
    memory = (peak_bytes() - before) / 1e6
    print(f"exact top-{words.depth}: {seconds:.1f} s, {memory:.0f} MB over the inputs, its result included")
    ranked = [[ids[1][column] for column in row] for row in columns]
    rows = compare(ranked, scores.tolist(), relevant)
    print("\n| library | prepare, s | judge, s | ratio of judging | largest difference |\n|---|---:|---:|---:|---:|")
    for name, preparing, judging, difference in rows:
        ratio = judging / rows[0][2]
        print(f"| {name} | {preparing:.2f} | {judging:.2f} | {ratio:.1f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
