"""`uvrb_retrieval` for `evaluate.load`: a thin door to `ranking.py`, which holds every number."""

import datasets
import evaluate

from .ranking import bootstrap_intervals, ranks_from_embeddings, ranks_from_ids, scores_by_query, unusable_rows


_DESCRIPTION = """\
Retrieval metrics of the Universal Video Retrieval Benchmark (UVRB): recall@k, precision@k, nDCG@k, MRR and MAP with
binary relevance and any number of relevant documents a query, from ranked ids or from embeddings.
"""

_CITATION = """\
@misc{gve2025,
    title = {Towards Universal Video Retrieval:
             Generalizing Video Embedding via Synthesized Multimodal Pyramid Curriculum},
    year = {2025},
    eprint = {2510.27571},
    archivePrefix = {arXiv},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of lists of `str`): each query's ranked corpus ids, best first.
    references (list of lists of `str`): each query's relevant corpus ids.
    k (`int` or list of `int`): cut-offs, 1, 5 and 10 by default.
    query_embeddings, corpus_embeddings (arrays or tensors of shape `(Q, D)` and `(N, D)`): instead of `predictions`.
    query_ids, corpus_ids (lists of `str`): of their rows.
    candidates (list of lists of `str`, *optional*): with embeddings, the corpus ids that each query ranks.
    n_resamples (`int`, defaults to 0): bootstrap resamples of the queries; 0 computes no intervals.
    confidence_level (`float`, defaults to 0.95): of the intervals.
    seed (`int`, defaults to 42): of the resamples.

Returns:
    `dict[str, float]`, means over queries: `recall@k` (the share of a query's relevant documents within the first k),
    `precision@k`, `ndcg@k` for each k, `mrr`, `map`; and `n_queries`. From embeddings also `n_corpus`,
    `n_unusable_queries` and `n_unusable_corpus`: rows of zeros, NaN or infinities, counted as misses. With
    `n_resamples` also `intervals`: both ends of a percentile bootstrap interval by metric.

Examples:

    >>> import evaluate
    >>> metric = evaluate.load("org/uvrb_retrieval")
    >>> scores = metric.compute(predictions=[["v2", "v1", "v3"], ["v3"]], references=[["v1"], ["v3", "v2"]], k=[1, 2])
    >>> scores["recall@1"], scores["recall@2"], scores["mrr"], scores["map"]
    (0.25, 0.75, 0.75, 0.5)
    >>> scores = metric.compute(
    ...     query_embeddings=[[1.0, 0.0], [0.0, 1.0]],
    ...     corpus_embeddings=[[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]],
    ...     query_ids=["q1", "q2"],
    ...     corpus_ids=["v1", "v2", "v3"],
    ...     references=[["v1"], ["v2"]],
    ...     k=1,
    ... )
    >>> scores["recall@1"], scores["mrr"], scores["n_corpus"]
    (0.5, 0.75, 3)
    >>> scores = metric.compute(predictions=[["v1"]] * 4, references=[["v1"]] * 4, k=1, n_resamples=100)
    >>> scores["intervals"]["recall@1"]
    (1.0, 1.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class UvrbRetrieval(evaluate.Metric):
    """Recall, precision, nDCG, MRR and MAP from ranked ids or embeddings."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2510.27571"],
        )

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        k=(1, 5, 10),
        query_embeddings=None,
        corpus_embeddings=None,
        query_ids=None,
        corpus_ids=None,
        candidates=None,
        n_resamples=0,
        confidence_level=0.95,
        seed=42,
    ):
        """Scores of ranked ids, or of embeddings, which never pass through evaluate's Arrow cache (slow and large)."""
        of_embeddings = (query_embeddings, corpus_embeddings, query_ids, corpus_ids)
        resampling = (n_resamples, confidence_level, seed)
        if all(value is None for value in (*of_embeddings, candidates)):
            return super().compute(predictions=predictions, references=references, k=k, resampling=resampling)
        if predictions is not None or references is None or any(value is None for value in of_embeddings):
            raise ValueError(
                "Give either predictions and references, or query_embeddings, corpus_embeddings, query_ids, "
                "corpus_ids and references (candidates only with embeddings)."
            )
        ranks = ranks_from_embeddings(*of_embeddings, references, candidates)
        return {
            **_summary(ranks, k, resampling),
            "n_corpus": len(corpus_ids),
            "n_unusable_queries": int(unusable_rows(query_embeddings).sum()),
            "n_unusable_corpus": int(unusable_rows(corpus_embeddings).sum()),
        }

    def _compute(self, predictions, references, k, resampling):
        return _summary(ranks_from_ids(predictions, references), k, resampling)


def _summary(ranks, k, resampling):
    scores = scores_by_query(ranks, k)
    summary = {**{name: float(values.mean()) for name, values in scores.items()}, "n_queries": len(ranks)}
    if resampling[0]:
        summary["intervals"] = bootstrap_intervals(scores, *resampling)
    return summary
