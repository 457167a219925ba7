"""`uvrb_retrieval` for `evaluate.load`: a thin door to `ranking.py`, which holds every number."""

import datasets
import evaluate

from .ranking import mean_scores, ranks_from_embeddings, ranks_from_ids, unusable_rows


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

Returns:
    `dict[str, float]`, means over queries: `recall@k` (the share of a query's relevant documents within the first k),
    `precision@k`, `ndcg@k` for each k, `mrr`, `map`; and `n_queries`. From embeddings also `n_corpus`,
    `n_unusable_queries` and `n_unusable_corpus`: rows of zeros, NaN or infinities, counted as misses.

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
    ):
        """Scores of ranked ids, or of embeddings, which never pass through evaluate's Arrow cache (slow and large)."""
        of_embeddings = (query_embeddings, corpus_embeddings, query_ids, corpus_ids)
        if all(value is None for value in (*of_embeddings, candidates)):
            return super().compute(predictions=predictions, references=references, k=k)
        if predictions is not None or references is None or any(value is None for value in of_embeddings):
            raise ValueError(
                "Give either predictions and references, or query_embeddings, corpus_embeddings, query_ids, "
                "corpus_ids and references (candidates only with embeddings)."
            )
        ranks = ranks_from_embeddings(*of_embeddings, references, candidates)
        return {
            **mean_scores(ranks, k),
            "n_queries": len(ranks),
            "n_corpus": len(corpus_ids),
            "n_unusable_queries": int(unusable_rows(query_embeddings).sum()),
            "n_unusable_corpus": int(unusable_rows(corpus_embeddings).sum()),
        }

    def _compute(self, predictions, references, k):
        ranks = ranks_from_ids(predictions, references)
        return {**mean_scores(ranks, k), "n_queries": len(ranks)}
