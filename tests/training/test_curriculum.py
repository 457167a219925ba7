"""The Modality Pyramid in closed forms."""

import math

import numpy as np
import pytest

from training.curriculum import Curriculum, probe_difficulty, probe_sample, sigma_at, task_probabilities
from training.epoch import same_content
from training.pairs import Pair, Side


RELEVANCE = {"t2t": 0.9, "t2v": 0.4, "v2v": 0.7}


def test_sigma_rises_linearly():
    assert [sigma_at(epoch, 4) for epoch in range(4)] == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert sigma_at(0, 1) == 0.1
    with pytest.raises(ValueError, match="epoch must be from 0 to 3, got 4"):
        sigma_at(4, 4)


def test_probabilities_in_closed_form():
    # exp(R / sigma) of 0 and sigma * ln 3 are 1 and 3.
    assert task_probabilities([0.0, 0.2 * math.log(3)], 0.2) == pytest.approx([0.25, 0.75])
    assert task_probabilities([0.5, 0.5, 0.5, 0.5], 0.1) == pytest.approx([0.25] * 4)
    assert task_probabilities([500.0, 0.0], 0.1) == pytest.approx([1, 0])  # no overflow


def test_well_aligned_tasks_first_all_alike_later():
    early, late = task_probabilities(list(RELEVANCE.values()), 0.1), task_probabilities(list(RELEVANCE.values()), 1.0)
    assert early[0] > 0.85
    assert late.max() / late.min() == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize(("scores", "sigma"), [([0.1, math.nan], 0.1), ([0.1], 0.0)])
def test_bad_scores_and_sigma(scores, sigma):
    with pytest.raises(ValueError, match="sigma must be above 0|finite relevance score"):
        task_probabilities(scores, sigma)


def test_every_rank_draws_the_same_task():
    ranks = [Curriculum(RELEVANCE, epochs=2, steps_per_epoch=50, seed=7) for _ in range(3)]
    for rank in ranks:
        rank.start_epoch(0, RELEVANCE)
    draws = [rank.draws(0) for rank in ranks]
    assert draws[0] == draws[1] == draws[2]
    other = Curriculum(RELEVANCE, epochs=2, steps_per_epoch=50, seed=8)
    other.start_epoch(0, RELEVANCE)
    assert other.draws(0) != draws[0]


def test_draws_follow_the_probabilities():
    curriculum = Curriculum(RELEVANCE, epochs=1, steps_per_epoch=20000, sigma_min=0.5)
    plan = curriculum.start_epoch(0, RELEVANCE)
    draws = curriculum.draws(0)
    for task, share in plan.probabilities.items():
        assert draws.count(task) / len(draws) == pytest.approx(share, abs=0.02)


def test_uniform_schedule_logs_relevance_but_ignores_it():
    curriculum = Curriculum(RELEVANCE, epochs=2, steps_per_epoch=10, schedule="uniform")
    plan = curriculum.start_epoch(0, RELEVANCE)
    assert list(plan.probabilities.values()) == pytest.approx([1 / 3] * 3)
    assert plan.relevance == RELEVANCE
    with pytest.raises(ValueError, match="schedule must be one of pyramid, .*, got 'random'"):
        Curriculum(RELEVANCE, 1, 1, schedule="random")


SIZES = {"t2t": 100, "t2v": 400, "v2v": 1600}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "proportional"}, [1 / 21, 4 / 21, 16 / 21]),
        ({"schedule": "temperature", "sampling_alpha": 0.5}, [1 / 7, 2 / 7, 4 / 7]),
        ({"schedule": "uniform", "upsampling": {"v2v": 2.0}}, [1 / 4, 1 / 4, 1 / 2]),
        ({"schedule": "proportional", "upsampling": {"t2t": 4.0, "t2v": 0}}, [4 / 20, 0, 16 / 20]),
    ],
)
def test_other_schedules_in_closed_form(settings, expected):
    plan = Curriculum(RELEVANCE, 2, 10, sizes=SIZES, **settings).start_epoch(0, RELEVANCE)
    assert list(plan.probabilities.values()) == pytest.approx(expected)


def test_difficulty_in_closed_form():
    same = np.eye(4, dtype=bool)
    assert probe_difficulty(np.zeros((4, 4)), same, 0.03) == pytest.approx(1)  # chance
    assert probe_difficulty(np.eye(4), same, 0.03) == pytest.approx(0, abs=1e-12)
    assert probe_difficulty(1 - np.eye(4), same, 0.5) == pytest.approx(math.log(1 + 3 * math.exp(2)) / math.log(4))
    assert probe_difficulty([[0.3]], same[:1, :1], 0.03) == 0
    # Two pairs of one source are no negatives of each other: two are left of three.
    same[0, 1] = same[1, 0] = True
    expected = (2 * math.log(3) + 2 * math.log(4)) / 4 / math.log(4)
    assert probe_difficulty(np.zeros((4, 4)), same, 0.03) == pytest.approx(expected)


def test_difficulty_schedule_goes_by_what_is_left():
    curriculum = Curriculum(RELEVANCE, 2, 10, schedule="difficulty")
    plan = curriculum.start_epoch(0, RELEVANCE, {"t2t": 0.08, "t2v": 0.58, "v2v": 0.28})
    assert list(plan.probabilities.values()) == pytest.approx([0.1, 0.6, 0.3])
    assert curriculum.state_dict()["history"][0]["difficulty"]["t2v"] == 0.58


def test_progress_schedule_goes_by_what_the_last_epoch_took():
    curriculum = Curriculum(RELEVANCE, 3, 10, schedule="progress")
    first = curriculum.start_epoch(0, RELEVANCE, {"t2t": 1.0, "t2v": 1.0, "v2v": 1.0})
    assert list(first.probabilities.values()) == pytest.approx([1 / 3] * 3)
    plan = curriculum.start_epoch(1, RELEVANCE, {"t2t": 0.82, "t2v": 0.28, "v2v": 1.3})  # v2v got worse
    assert list(plan.probabilities.values()) == pytest.approx([0.2 / 0.96, 0.74 / 0.96, 0.02 / 0.96])


def test_reversed_is_hard_tasks_first():
    """P of the pyramid times P of its reversal is the same for every task."""
    plans = [Curriculum(RELEVANCE, 2, 10, schedule=name).start_epoch(0, RELEVANCE) for name in ("pyramid", "reversed")]
    products = [plans[0].probabilities[task] * plans[1].probabilities[task] for task in RELEVANCE]
    assert products == pytest.approx([products[0]] * 3)
    assert max(plans[1].probabilities, key=plans[1].probabilities.get) == "t2v"
    with pytest.raises(ValueError, match="schedule proportional needs sizes"):
        Curriculum(RELEVANCE, 2, 10, schedule="proportional")


def test_restored_curriculum_goes_on_alike():
    whole = Curriculum(RELEVANCE, epochs=3, steps_per_epoch=30)
    whole.start_epoch(0, RELEVANCE)
    restored = Curriculum(RELEVANCE, epochs=3, steps_per_epoch=30)
    restored.load_state_dict(whole.state_dict())
    assert restored.draws(0) == whole.draws(0)
    with pytest.raises(ValueError, match="epoch 1 starts next, got 0"):
        restored.start_epoch(0, RELEVANCE)
    assert restored.start_epoch(1, RELEVANCE) == whole.start_epoch(1, RELEVANCE)


def test_probe_sample_is_one_for_all_epochs():
    rows = probe_sample("t2v", 100, 20, seed=1)
    assert rows == probe_sample("t2v", 100, 20, seed=1) != probe_sample("v2v", 100, 20, seed=1)
    assert len(set(rows)) == 20
    assert probe_sample("t2v", 5, 20, seed=1) == list(np.arange(5))


def test_pairs_of_one_content_or_source():
    def pair(query, target, source):
        return Pair(Side(query), Side(target), (), None, source)

    pairs = [pair("a", "x", "1"), pair("b", "x", "2"), pair("c", "y", "2"), pair("d", "z", None), pair("e", "w", None)]
    same = same_content(pairs)
    assert same.tolist() == same.T.tolist()
    assert {(row, column) for row, column in zip(*same.nonzero()) if row < column} == {(0, 1), (1, 2)}
