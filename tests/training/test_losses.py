"""The objective against direct evaluation of its formula, and in closed forms; across ranks in test_ranks.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import (
    false_negatives,
    info_nce,
    matryoshka_info_nce,
    symmetric_info_nce,
)


def random_rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def equation_1(queries, targets, negatives, valid, temperature):
    """Both directions, candidate by candidate, in NumPy."""
    total = 0.0
    for query, target in zip(queries, targets):
        positive = math.exp(query @ target / temperature)
        to_targets = sum(math.exp(query @ other / temperature) for other in targets)
        to_negatives = sum(
            math.exp(query @ negative / temperature)
            for row, slots in zip(negatives, valid)
            for negative, exists in zip(row, slots)
            if exists
        )
        to_queries = sum(math.exp(target @ other / temperature) for other in queries)
        total += -math.log(positive / (to_targets + to_negatives)) - math.log(positive / to_queries)
    return total / 2 / len(queries)


@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_equals_equation_1(num_negatives):
    queries, targets = random_rows(5, 8), random_rows(5, 8, seed=1)
    negatives = random_rows(5, num_negatives, 8, seed=2)
    valid = torch.ones(5, num_negatives, dtype=torch.bool)
    valid[3:, 1:] = False  # some rows have fewer negatives
    output = symmetric_info_nce(queries, targets, negatives, valid, 0.2, identical_tolerance=None, margin=None)
    expected = equation_1(queries.numpy(), targets.numpy(), negatives.numpy(), valid.numpy(), 0.2)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


def test_hard_negatives_reach_queries_and_leave_the_other_direction_whole():
    queries, targets, negatives = random_rows(4, 8), random_rows(4, 8, seed=1), random_rows(4, 2, 8, seed=2)
    rules = {"temperature": 0.1, "identical_tolerance": None, "margin": None}
    without = symmetric_info_nce(queries, targets, **rules).loss
    with_negatives = symmetric_info_nce(queries, targets, negatives, **rules).loss
    backward = info_nce(targets @ queries.T, torch.arange(4), 0.1)
    forward = info_nce(queries @ torch.cat([targets, negatives.flatten(0, 1)]).T, torch.arange(4), 0.1)
    assert with_negatives > without
    assert with_negatives.item() == pytest.approx((forward + backward).item() / 2)


def test_one_direction_is_the_queries():
    queries, targets, negatives = random_rows(4, 8), random_rows(4, 8, seed=1), random_rows(4, 2, 8, seed=2)
    rules = {"temperature": 0.1, "identical_tolerance": None, "margin": None}
    one = symmetric_info_nce(queries, targets, negatives, symmetric=False, **rules).loss
    candidates = torch.cat([targets, negatives.flatten(0, 1)])
    assert one.item() == pytest.approx(info_nce(queries @ candidates.T, torch.arange(4), 0.1).item())


def test_matryoshka_is_the_mean_over_prefixes():
    queries, targets, negatives = random_rows(4, 8), random_rows(4, 8, seed=1), random_rows(4, 2, 8, seed=2)
    rules = {"temperature": 0.1, "margin": None}
    output = matryoshka_info_nce(queries, targets, negatives, dims=[4, 2], **rules)
    full = symmetric_info_nce(queries, targets, negatives, **rules)
    prefixes = [
        symmetric_info_nce(*(F.normalize(rows[..., :size], dim=-1) for rows in (queries, targets, negatives)), **rules)
        for size in (4, 2)
    ]
    assert output.loss.item() == pytest.approx(sum(each.loss.item() for each in (full, *prefixes)) / 3)
    assert output.positive_score == full.positive_score
    assert matryoshka_info_nce(queries, targets, negatives, **rules).loss == full.loss
    with pytest.raises(ValueError, match="matryoshka_dims must be below the embedding's 8, got 8"):
        matryoshka_info_nce(queries, targets, dims=[2, 8])


def test_identical_embeddings_give_the_log_of_the_candidate_count():
    rows = random_rows(1, 8).expand(6, 8)
    negatives = rows[:, None].expand(6, 2, 8)
    output = symmetric_info_nce(rows, rows, negatives, identical_tolerance=None, margin=None)
    assert output.loss.item() == pytest.approx((math.log(6 + 12) + math.log(6)) / 2)
    assert output.positive_score.item() == pytest.approx(1)
    assert output.negative_gap.item() == pytest.approx(0, abs=1e-12)
    assert output.masked.item() == 0


def test_orthogonal_pairs_in_closed_form():
    rows = torch.eye(4, dtype=torch.float64)
    output = symmetric_info_nce(rows, rows, temperature=0.5)
    assert output.loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    assert output.relevance.item() == pytest.approx(0.25)
    assert output.negative_gap.item() == pytest.approx(-1)


def test_candidate_identical_to_the_positive_is_masked_in_both_directions():
    rows = torch.eye(3, dtype=torch.float64)
    rows[1] = rows[0]  # queries 0 and 1, and targets 0 and 1, are the same
    output = symmetric_info_nce(rows, rows, temperature=0.5, margin=None)
    first, last = math.log(1 + math.exp(-2)), math.log(1 + 2 * math.exp(-2))
    assert output.loss.item() == pytest.approx((2 * first + last) / 3)
    assert output.masked.item() == pytest.approx(4 / 12)


def test_equal_contents_are_masked_although_dropout_embeds_them_unlike():
    rows = torch.eye(4, dtype=torch.float64)
    negatives = rows[[3, 3, 3]][:, None]
    contents = (torch.tensor([1, 2, 1]), torch.tensor([7, 8, 9]), torch.tensor([[9], [5], [6]]))
    settings = {"temperature": 0.5, "margin": None, "contents": contents}
    output = symmetric_info_nce(rows[:3], rows[:3], negatives, **settings)
    # q -> y: query 2 leaves out negative 0, which has its target's content.
    own = math.exp(2)
    forward = [own + 5, own + 5, own + 4]
    backward = [own + 1, own + 2, own + 1]  # queries 0 and 2 are the same
    expected = sum(math.log(each) - 2 for each in forward + backward) / 6
    assert output.loss.item() == pytest.approx(expected)
    assert output.masked.item() == pytest.approx(3 / 21)
    off = symmetric_info_nce(rows[:3], rows[:3], negatives, **settings, identical_tolerance=None)
    assert off.masked.item() == 0


def test_candidate_that_outscores_the_positive_is_masked_only_beyond_the_margin():
    scores = torch.tensor([[0.5, 0.59, 0.61, 0.2]])
    rows = torch.eye(4)
    mask = false_negatives(scores, torch.tensor([0]), rows, rows[:1])
    assert mask.tolist() == [[False, False, True, False]]
    assert not false_negatives(scores, torch.tensor([0]), rows, rows[:1], margin=None).any()


def test_all_negatives_masked_leaves_no_gap_and_no_loss():
    rows = random_rows(1, 8).expand(3, 8)
    output = symmetric_info_nce(rows, rows)
    assert output.loss.item() == 0
    assert output.negative_gap.item() == -math.inf
    assert output.masked.item() == 1


def test_gradients_are_right_with_negatives_and_masks():
    queries, targets = random_rows(3, 4).requires_grad_(), random_rows(3, 4, seed=1).requires_grad_()
    negatives = random_rows(3, 2, 4, seed=2).requires_grad_()
    valid = torch.tensor([[True, True], [True, False], [False, False]])

    def loss(queries, targets, negatives):
        return symmetric_info_nce(queries, targets, negatives, valid, temperature=0.3, margin=0.5).loss

    assert torch.autograd.gradcheck(loss, (queries, targets, negatives))
    loss(queries, targets, negatives).backward()
    assert negatives.grad[~valid].abs().max() == 0


@pytest.mark.parametrize("temperature", [0, -0.03, 1.5, math.nan, "0.03", True])
def test_temperature_is_range_checked(temperature):
    rows = random_rows(2, 4)
    with pytest.raises(ValueError, match="temperature must be a number from 0.001 to 1.0"):
        symmetric_info_nce(rows, rows, temperature=temperature)


def test_shapes_are_checked():
    rows = random_rows(2, 4)
    with pytest.raises(ValueError, match="queries and targets must both be"):
        symmetric_info_nce(rows, rows[:1])
    with pytest.raises(ValueError, match=r"negatives must be \(B, N, D\)"):
        symmetric_info_nce(rows, rows, rows)
    with pytest.raises(ValueError, match="negatives_valid must be"):
        symmetric_info_nce(rows, rows, rows[:, None], torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="positives must be columns from 0 to 1"):
        info_nce(rows @ rows.T, torch.tensor([0, 2]), 0.1)
