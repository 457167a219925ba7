"""The averaging rule of UVRB (arXiv 2510.27571): from 16 dataset scores to 9 abilities and two averages. Plain Python.

An ability is a mean of datasets or of other abilities, so a dataset's weight depends on how many share its ability.
That is not the flat average that other papers print, which is `avg_datasets` here. Nothing is rounded on the way.
"""

import math
from collections.abc import Mapping


ABILITY_DATASETS = {
    "CMP": ("ms_ti", "ms_tv"),
    "VIS": ("msrvtt_i2v", "lovr_c2v"),
    "CG": ("msrvtt", "didemo", "crb_g"),
    "LC": ("lovr_v", "vdc_d"),
    "S": ("crb_s", "vdc_o"),
    "T": ("crb_t", "cmrb"),
    "PR": ("dream_e", "lovr_th", "pev_k"),
}
ABILITY_PARTS = {"FG": ("S", "T", "PR"), "TXT": ("CG", "FG", "LC")}  # means of abilities, inner ones first
ABILITIES = ("TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")
AVERAGED = ("TXT", "CMP", "VIS", "CG", "FG", "LC")  # what avg_abilities is the mean of
DATASETS = (
    *("msrvtt", "didemo", "crb_g", "crb_s", "vdc_o", "crb_t", "cmrb", "dream_e"),
    *("lovr_th", "pev_k", "lovr_v", "vdc_d", "ms_ti", "ms_tv", "msrvtt_i2v", "lovr_c2v"),
)


def ability_scores(scores):
    """The 9 abilities and both averages.

    Nothing is averaged over fewer datasets than the rule says: what a missing score enters is `None`.

    Args:
        scores (`dict[str, float]`): by dataset key, each from 0 to 1 (recall@1 but recall@10 for `cmrb` and `lovr_th`,
            precision@1 for `ms_ti` and `ms_tv`); may lack some of the 16.

    Returns:
        `dict`: the 9 abilities, `avg_abilities` and `avg_datasets` (`float` or `None`), then `missing_datasets` and
        `incomplete_abilities` (lists of `str`).

    Raises:
        ValueError: no scores by key, an unknown key, or a score that is no number from 0 to 1.

    >>> result = ability_scores({"ms_ti": 0.34, "ms_tv": 0.28})
    >>> round(result["CMP"], 3), result["TXT"], result["incomplete_abilities"]
    (0.31, None, ['TXT', 'VIS', 'CG', 'FG', 'LC', 'S', 'T', 'PR'])
    """
    _check(scores)
    values = {ability: _mean(scores, keys) for ability, keys in ABILITY_DATASETS.items()}
    for ability, parts in ABILITY_PARTS.items():
        values[ability] = _mean(values, parts)
    return {
        **{ability: values[ability] for ability in ABILITIES},
        "avg_abilities": _mean(values, AVERAGED),
        "avg_datasets": _mean(scores, DATASETS),
        "missing_datasets": [key for key in DATASETS if key not in scores],
        "incomplete_abilities": [ability for ability in ABILITIES if values[ability] is None],
    }


def score_columns(scores_by_model):
    """Abilities, both averages and dataset scores as columns over models, for correlations.

    Args:
        scores_by_model (`dict[str, dict[str, float]]`): scores by dataset key; each model covers all 16.

    Returns:
        `dict[str, list of float]`: one value a model under each of the 9 abilities, 2 averages and 16 datasets.

    Raises:
        ValueError: a model lacks a dataset.

    >>> list(score_columns({"a": dict.fromkeys(DATASETS, 0.5)}))[:3]
    ['TXT', 'CMP', 'VIS']
    """
    rows = []
    for model, scores in scores_by_model.items():
        result = ability_scores(scores)
        if result["missing_datasets"]:
            raise ValueError(f"{model} lacks {', '.join(result['missing_datasets'])}; correlate models with all 16.")
        rows.append({**result, **scores})
    names = (*ABILITIES, "avg_abilities", "avg_datasets", *DATASETS)
    return {name: [row[name] for row in rows] for name in names}


def coverage_note(result):
    """One sentence on what a result of `ability_scores` leaves out, or `""` where it covers all 16 datasets.

    >>> coverage_note(ability_scores({key: 0.5 for key in DATASETS if key != "vdc_d"}))
    'Partial coverage: 15 of 16 datasets, without vdc_d; no value for TXT, LC, avg_abilities, avg_datasets.'
    """
    missing = result["missing_datasets"]
    if not missing:
        return ""
    empty = [name for name in (*ABILITIES, "avg_abilities", "avg_datasets") if result[name] is None]
    covered = f"{len(DATASETS) - len(missing)} of {len(DATASETS)} datasets, without {', '.join(missing)}"
    return f"Partial coverage: {covered}; no value for {', '.join(empty)}."


def _mean(values, keys):
    if any(values.get(key) is None for key in keys):
        return None
    return math.fsum(values[key] for key in keys) / len(keys)


def _check(scores):
    if not isinstance(scores, Mapping):
        raise ValueError(f"The scores are {scores!r}; give them by dataset key, such as {{'msrvtt': 0.46}}.")
    unknown = sorted(set(scores) - set(DATASETS))
    if unknown:
        raise ValueError(f"Unknown dataset key(s) {', '.join(unknown)}; UVRB has {', '.join(DATASETS)}.")
    for key, score in scores.items():
        if score is None or isinstance(score, (str, bool, list, dict)) or not 0 <= score <= 1:
            raise ValueError(
                f"The score of {key} is {score!r}; give a number from 0 to 1 (divide percentages by 100)."
            )
