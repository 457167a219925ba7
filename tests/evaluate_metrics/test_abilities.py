"""Abilities: the paper's figures, hand-worked means, partial coverage and messages."""

import math
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import evaluate
import numpy as np
import pytest

from evaluate_metrics.uvrb_abilities.averages import (
    ABILITIES,
    ABILITY_DATASETS,
    ABILITY_PARTS,
    AVERAGED,
    DATASETS,
    ability_scores,
    coverage_note,
    score_columns,
)
from evaluate_metrics.uvrb_abilities.correlations import METHODS, correlation_matrix, pearson, spearman
from evaluate_metrics.uvrb_abilities.printed import (
    GROUPS,
    STATED,
    deviations,
    follows,
    printed_abilities,
    printed_correlations,
)
from evaluate_metrics.uvrb_abilities.published import published_scores


CARD = Path(__file__).parents[2] / "evaluate_metrics" / "uvrb_abilities" / "README.md"
COMPUTED = {model: ability_scores(scores) for model, scores in published_scores().items()}
MISPRINTS = [("GME-2B", "avg_abilities"), *(("VLM2Vec-V2", n) for n in ("avg_abilities", "TXT", "CG", "avg_datasets"))]


def rounded_on_the_way(model):
    """Abilities and averages with every mean rounded to three decimals, half up, before the next."""

    def mean(values):
        return (sum(values) / len(values)).quantize(Decimal("0.001"), ROUND_HALF_UP)

    values = {key: Decimal(str(score)) for key, score in published_scores()[model].items()}
    averages = {"avg_abilities": AVERAGED, "avg_datasets": DATASETS}
    for name, parts in {**ABILITY_DATASETS, **ABILITY_PARTS, **averages}.items():
        values[name] = mean([values[part] for part in parts])
    return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize("model", published_scores())
def test_table_2_follows_from_table_1(model):
    """Every cell is the mean, rounded once or rounded at each step, but for the misprints that the card lists."""
    stepwise = rounded_on_the_way(model)
    for name, value in printed_abilities()[model].items():
        right = follows(value, COMPUTED[model][name], 3) or value == stepwise[name]
        assert right is ((model, name) not in MISPRINTS), name


def test_the_card_lists_the_cells_that_do_not_follow():
    off = deviations(COMPUTED)
    rows = [
        f"| {model} | {name} | {printed:.3f} | {computed:.4f} | {difference:+.4f} | "
        for model, name, printed, computed, difference in off
    ]
    lines = CARD.read_text().splitlines()
    first = lines.index(next(line for line in lines if line.startswith(rows[0])))
    listed = lines[first : first + len(rows)]
    assert all(line.startswith(row) for line, row in zip(listed, rows)) and not lines[first + len(rows)]
    reasons = {(model, name): line.endswith("| rounding |") for (model, name, *_), line in zip(off, listed)}
    assert reasons == {cell: cell not in MISPRINTS for cell in reasons}


def test_one_score_explains_the_cells_of_vlm2vec():
    """A CG score higher by 0.037, whichever of the three, gives all four as printed."""
    for key in ABILITY_DATASETS["CG"]:
        scores = published_scores()["VLM2Vec-V2"]
        result = ability_scores({**scores, key: scores[key] + 0.037})
        for name in ("CG", "TXT", "avg_abilities", "avg_datasets"):
            assert result[name] == pytest.approx(printed_abilities()["VLM2Vec-V2"][name], abs=1e-3)


def columns(source, group):
    models = list(published_scores())[GROUPS[group]]
    scores = {"recomputed": COMPUTED, "printed": printed_abilities()}[source]
    rows = [{**scores[model], **published_scores()[model]} for model in models]
    return {name: [row[name] for row in rows] for name in (*ABILITIES, "avg_abilities", "msrvtt")}


@pytest.mark.parametrize(
    ("group", "counts"), [("clip_based", (0, 28, 1, 36)), ("mllm_based", (2, 3, 1, 4)), ("all", (0, 5, 0, 4))]
)
def test_how_many_of_the_printed_correlations_follow(group, counts):
    """By Pearson and Spearman from the recomputed abilities, then by both from the printed ones, as the card says."""
    printed, found = printed_correlations()[group], []
    assert len(printed) == 36
    for source in ("recomputed", "printed"):
        for method in METHODS:
            matrix = correlation_matrix(columns(source, group), method)
            found.append(sum(follows(value, matrix[a][b], 2) for (a, b), value in printed.items()))
    assert tuple(found) == counts
    cells = [int(cell.strip(" *")) for cell in card_row("CLIP|MLLM|all".split("|")[list(GROUPS).index(group)])[2:]]
    assert tuple(cells) == counts


def card_row(start):
    line = next(line for line in CARD.read_text().splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_which_of_the_stated_correlations_follow():
    found = {
        (pair, group, source, method)
        for pair, value in STATED.items()
        for group in GROUPS
        for source in ("recomputed", "printed")
        for method, function in METHODS.items()
        if follows(value, function(*(columns(source, group)[name] for name in pair)), 2)
    }
    assert found == {
        (("PR", "avg_abilities"), "all", "recomputed", "pearson"),
        (("T", "FG"), "mllm_based", "printed", "spearman"),
    }
    for pair, value in STATED.items():
        assert card_row(", ".join(pair))[1:3] != [] and f"{value:.2f}" == card_row(", ".join(pair))[1]
        assert card_row(", ".join(pair))[2].startswith("none") is (pair not in {cell[0] for cell in found})


def test_correlations_equal_numpy_s_and_ties_share_their_rank():
    data = np.random.default_rng(0).integers(0, 6, (2, 40))
    assert pearson(*data.tolist()) == pytest.approx(np.corrcoef(data)[0, 1])
    ranks = [[(row < value).sum() + ((row == value).sum() + 1) / 2 for value in row] for row in data]
    assert spearman(*data.tolist()) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 and 2 values"):
        pearson([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="'kendall'; choose pearson or spearman"):
        correlation_matrix({"S": [1, 2]}, "kendall")
    with pytest.raises(ValueError, match="mine lacks didemo"):
        score_columns({"mine": {"msrvtt": 0.5}})


def test_published_scores_are_whole():
    table = published_scores()
    assert len(table) == 16
    assert all(tuple(scores) == DATASETS for scores in table.values())


def test_weights_of_the_datasets():
    """One dataset at 1, the others at 0, gives its weight; the weights add up to 1."""
    weights = {key: ability_scores({**dict.fromkeys(DATASETS, 0), key: 1})["avg_abilities"] for key in DATASETS}
    assert math.fsum(weights.values()) == pytest.approx(1)
    assert weights["ms_ti"] == pytest.approx(1 / 12)  # half of CMP, a sixth
    assert weights["msrvtt"] == pytest.approx(1 / 18 + 1 / 54)  # a third of CG, and of TXT's CG
    assert weights["cmrb"] == pytest.approx(1 / 36 + 1 / 108)  # half of T, a third of FG, and of TXT's FG


def test_partial_coverage_is_said_and_nothing_is_averaged_over_fewer():
    result = ability_scores({key: 0.5 for key in DATASETS if key != "cmrb"})
    assert result["missing_datasets"] == ["cmrb"]
    assert result["incomplete_abilities"] == ["TXT", "FG", "T"]
    assert result["S"] == 0.5 and result["T"] is None
    assert result["avg_abilities"] is None and result["avg_datasets"] is None
    assert "15 of 16 datasets, without cmrb" in coverage_note(result)
    assert coverage_note(ability_scores(dict.fromkeys(DATASETS, 0.5))) == ""


@pytest.mark.parametrize("score", [46.4, -0.1, float("nan"), "0.4", True, None, [0.4]])
def test_a_score_that_is_none_is_refused(score):
    with pytest.raises(ValueError, match="score of msrvtt.*from 0 to 1"):
        ability_scores({"msrvtt": score})


@pytest.mark.parametrize("scores", [[0.4], 3])
def test_scores_without_keys_are_refused(scores):
    with pytest.raises(ValueError, match="give them by dataset key"):
        ability_scores(scores)


def test_unknown_names_are_named(tmp_path):
    with pytest.raises(ValueError, match="msrvttt; UVRB has msrvtt, didemo"):
        ability_scores({"msrvttt": 0.4})
    metric = evaluate.load(
        str(Path(__file__).parents[2] / "evaluate_metrics" / "uvrb_abilities"), cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="No published scores of GVE-9B; choose from CLIP4Clip"):
        metric.compute(scores=published_scores()["GVE-7B"], compare=["GVE-9B"])
    with pytest.warns(UserWarning, match="Partial coverage: 1 of 16"):
        table = metric.compute(scores={"msrvtt": 0.4}, correlate="pearson")["correlations"]
    assert table["T"]["FG"] == pytest.approx(0.738, abs=5e-4)  # the paper's 16 models alone
    with_mine = metric.compute(scores=dict.fromkeys(DATASETS, 0.0), correlate="pearson")["correlations"]
    assert with_mine["T"]["FG"] != table["T"]["FG"]
