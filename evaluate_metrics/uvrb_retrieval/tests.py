"""Hand-worked cases of `uvrb_retrieval`: inputs of `compute` and some of what it must return."""

test_cases = [
    {  # one relevant document, found second: 1 / log2(3) = 0.6309
        "inputs": {"predictions": [["a", "b"]], "references": [["b"]], "k": [1, 2]},
        "result": {
            "recall@1": 0.0,
            "recall@2": 1.0,
            "precision@2": 0.5,
            "ndcg@2": 0.6309297535714574,
            "mrr": 0.5,
            "map": 0.5,
        },
    },
    {  # two relevant documents, found first and third: recall counts shares, map = (1 + 2/3) / 2
        "inputs": {"predictions": [["a", "b", "c"]], "references": [["a", "c"]], "k": [1, 3]},
        "result": {"recall@1": 0.5, "precision@1": 1.0, "recall@3": 1.0, "mrr": 1.0, "map": 0.8333333333333333},
    },
    {  # nothing found
        "inputs": {"predictions": [[]], "references": [["a"]], "k": 10},
        "result": {"recall@10": 0.0, "precision@10": 0.0, "ndcg@10": 0.0, "mrr": 0.0, "map": 0.0, "n_queries": 1},
    },
    {  # a tie goes to the earlier document
        "inputs": {
            "query_embeddings": [[1.0, 1.0]],
            "corpus_embeddings": [[0.0, 3.0], [2.0, 0.0]],
            "query_ids": ["q"],
            "corpus_ids": ["first", "second"],
            "references": [["second"]],
            "k": [1, 2],
        },
        "result": {"recall@1": 0.0, "recall@2": 1.0, "mrr": 0.5},
    },
    {  # candidates leave the best match out; the row of NaN is never retrieved
        "inputs": {
            "query_embeddings": [[1.0, 0.0]],
            "corpus_embeddings": [[1.0, 0.0], [0.5, 0.5], [0.1, 0.9], [float("nan"), 0.0]],
            "query_ids": ["q"],
            "corpus_ids": ["a", "b", "c", "d"],
            "references": [["b"]],
            "candidates": [["d", "c", "b"]],
            "k": 1,
        },
        "result": {"precision@1": 1.0, "n_unusable_corpus": 1, "n_unusable_queries": 0},
    },
]
