"""Correlations of scores over models, as plain Python."""

import math


def pearson(left, right):
    """Pearson's correlation of two equally long sequences; `None` where one of them is constant.

    >>> round(pearson([1, 2, 3], [2, 4, 7]), 4), pearson([1, 1, 1], [1, 2, 3])
    (0.9934, None)
    """
    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"{len(left)} and {len(right)} values; give two or more of each, one of each a model.")
    left, right = _centred(left), _centred(right)
    scale = math.sqrt(math.fsum(x * x for x in left) * math.fsum(y * y for y in right))
    if scale == 0:
        return None
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(left, right)) / scale))


def spearman(left, right):
    """Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank.

    >>> spearman([1, 2, 3], [2, 4, 70]), round(spearman([1, 1, 2], [1, 2, 3]), 4)
    (1.0, 0.866)
    """
    return pearson(_ranks(left), _ranks(right))


METHODS = {"pearson": pearson, "spearman": spearman}


def correlation_matrix(columns, method="pearson"):
    """Correlations of all columns with all columns.

    Args:
        columns (`dict[str, list of float]`): scores by name, each over the same models in the same order.
        method (`str`): `pearson` or `spearman`.

    Returns:
        `dict[str, dict[str, float or None]]`: symmetric; `None` where a column is constant.

    Raises:
        ValueError: another method, or columns of unequal length or of fewer than two models.

    >>> correlation_matrix({"S": [0.1, 0.2, 0.4], "T": [0.3, 0.2, 0.1]}, "spearman")["S"]["T"]
    -1.0
    """
    if method not in METHODS:
        raise ValueError(f"No correlation called {method!r}; choose pearson or spearman.")
    return {a: {b: METHODS[method](columns[a], columns[b]) for b in columns} for a in columns}


def _centred(values):
    mean = math.fsum(values) / len(values)
    return [0.0 if min(values) == max(values) else value - mean for value in values]


def _ranks(values):
    values = [round(value, 9) for value in values]  # equal means stay equal, whatever order they were added in
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]
