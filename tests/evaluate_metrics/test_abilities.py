"""Abilities: the paper's figures, hand-worked means, partial coverage and messages."""

import math
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import evaluate
import pytest

from evaluate_metrics.uvrb_abilities.averages import (
    ABILITIES,
    ABILITY_DATASETS,
    ABILITY_PARTS,
    AVERAGED,
    DATASETS,
    ability_scores,
    coverage_note,
)
from evaluate_metrics.uvrb_abilities.published import published_scores


PRINTED = {  # the paper's table 2: average, then the abilities
    "GVE-7B": (0.6, 0.657, 0.312, 0.657, 0.587, 0.57, 0.814, 0.821, 0.469, 0.419),
    "GVE-3B": (0.571, 0.619, 0.304, 0.647, 0.552, 0.541, 0.764, 0.816, 0.43, 0.377),
    "GME-7B": (0.562, 0.604, 0.341, 0.615, 0.518, 0.507, 0.788, 0.749, 0.373, 0.398),
    "Unite-7B": (0.559, 0.609, 0.254, 0.666, 0.541, 0.539, 0.746, 0.779, 0.412, 0.425),
}


@pytest.mark.parametrize("model", PRINTED)
def test_printed_abilities_follow_from_the_scores(model):
    """Within a thousandth, as the scores themselves are rounded and the paper rounds on the way."""
    result = ability_scores(published_scores()[model])
    assert [result[name] for name in ("avg_abilities", *ABILITIES)] == pytest.approx(PRINTED[model], abs=1.01e-3)


def test_gve_7b_is_exactly_as_printed_when_every_step_is_rounded():
    """The paper's 0.600: each ability rounded to three decimals, half up, before the next mean."""

    def mean(values):
        return (sum(values) / len(values)).quantize(Decimal("0.001"), ROUND_HALF_UP)

    values = {key: Decimal(str(score)) for key, score in published_scores()["GVE-7B"].items()}
    for ability, parts in {**ABILITY_DATASETS, **ABILITY_PARTS}.items():
        values[ability] = mean([values[part] for part in parts])
    printed = [float(value) for value in (mean([values[a] for a in AVERAGED]), *(values[a] for a in ABILITIES))]
    assert printed == list(PRINTED["GVE-7B"])


def test_flat_average_is_the_paper_s():
    averages = {"GVE-7B": 0.573, "GVE-3B": 0.544, "GME-7B": 0.53, "CLIP4Clip": 0.39}
    for model, printed in averages.items():
        assert ability_scores(published_scores()[model])["avg_datasets"] == pytest.approx(printed, abs=5.1e-4)


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


@pytest.mark.parametrize("score", [46.4, -0.1, float("nan"), "0.4", True])
def test_a_score_that_is_none_is_refused(score):
    with pytest.raises(ValueError, match="score of msrvtt.*from 0 to 1"):
        ability_scores({"msrvtt": score})


def test_unknown_names_are_named(tmp_path):
    with pytest.raises(ValueError, match="msrvttt; UVRB has msrvtt, didemo"):
        ability_scores({"msrvttt": 0.4})
    metric = evaluate.load(
        str(Path(__file__).parents[2] / "evaluate_metrics" / "uvrb_abilities"), cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="No published scores of GVE-9B; choose from CLIP4Clip"):
        metric.compute(scores=published_scores()["GVE-7B"], compare=["GVE-9B"])
    with pytest.warns(UserWarning, match="Partial coverage: 1 of 16"):
        metric.compute(scores={"msrvtt": 0.4})
