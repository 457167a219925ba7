"""The contrastive objective of GVE (arXiv 2510.27571, eq. 1) as pure functions.

Axes: B queries a rank, R ranks, N hard negatives a query, D embedding dimension. All embeddings are L2-normalised, so
every product below is a cosine.

The two directions, with q a query and y its target:

- q -> y: a query's candidates are the targets of all R * B queries and their R * B * N hard negatives;
- y -> q: a target's candidates are all R * B queries. A hard negative is a candidate for queries and has no query of
  its own, so this direction has no column for it. It stays a full R * B wide softmax whatever N is.

The loss is the mean of both. Candidates of other ranks arrive through `gather_with_grad`, so that averaging the ranks'
gradients, as DDP does, gives the gradient of one rank that holds the joined batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


TEMPERATURE_RANGE = (0.001, 1.0)


class ContrastiveOutput(NamedTuple):
    """Loss and what is logged beside it, over this rank's queries.

    Attributes:
        loss (`torch.Tensor` of shape `()`): (L_q->y + L_y->q) / 2, mean nats a query, with gradient.
        positive_score (`torch.Tensor` of shape `()`): mean cosine of the positive pairs.
        relevance (`torch.Tensor` of shape `()`): mean cosine of every query with every candidate.
        negative_gap (`torch.Tensor` of shape `()`): the largest, over queries, of the best remaining negative's cosine
            minus the positive's. Above 0 a negative outranks a positive; -inf where masking left no negative.
        masked (`torch.Tensor` of shape `()`): the share of the negatives of both directions that was masked.
    """

    loss: torch.Tensor
    positive_score: torch.Tensor
    relevance: torch.Tensor
    negative_gap: torch.Tensor
    masked: torch.Tensor


class _GatherWithGrad(torch.autograd.Function):
    """Concatenate every rank's rows; backward sums each row's gradient over the ranks that used it."""

    @staticmethod
    def forward(ctx, rows):
        ctx.rank, ctx.size = dist.get_rank(), rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size]


def gather_with_grad(rows):
    """Rows of all ranks, in rank order, differentiable.

    Args:
        rows (`torch.Tensor` of shape `(M, ...)`): the same shape on every rank.

    Returns:
        `torch.Tensor` of shape `(R * M, ...)`. The input itself where no process group of several ranks exists.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherWithGrad.apply(rows)


def check_temperature(temperature):
    """Return the temperature, or raise a `ValueError` that says which range is meant."""
    low, high = TEMPERATURE_RANGE
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not low <= temperature <= high:
        raise ValueError(f"temperature must be a number from {low} to {high} (the paper: 0.03), got {temperature!r}")
    return float(temperature)


def false_negatives(
    scores, positives, candidates, positive_rows, identical_tolerance=1e-5, margin=0.1, identical=None
):
    """Which candidates are taken for unlabelled positives, as the authors' code does.

    Args:
        scores (`torch.Tensor` of shape `(B, M)`): cosines of anchors and candidates.
        positives (`torch.LongTensor` of shape `(B,)`): each anchor's own column.
        candidates (`torch.Tensor` of shape `(M, D)`): L2-normalised.
        positive_rows (`torch.Tensor` of shape `(B, D)`): each anchor's positive, `candidates[positives]`.
        identical_tolerance (`float`, *optional*): mask a candidate whose cosine with the positive is at least
            1 - tolerance; None switches the rule off.
        margin (`float`, *optional*): mask a candidate that outscores the positive by more; None switches it off.
        identical (`torch.BoolTensor` of shape `(B, M)`, *optional*): candidates of the positive's content, masked too.

    Returns:
        `torch.BoolTensor` of shape `(B, M)`: True where masked, never at the positive itself.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if identical_tolerance is not None:
        mask |= positive_rows @ candidates.T >= 1 - identical_tolerance
    if margin is not None:
        mask |= scores > scores.gather(1, positives[:, None]) + margin
    if identical is not None:
        mask |= identical
    return mask.scatter_(1, positives[:, None], False)


def info_nce(scores, positives, temperature, mask=None):
    """InfoNCE in one direction: cross-entropy of each anchor's positive among the candidates that are not masked.

    Args:
        scores (`torch.Tensor` of shape `(B, M)`): cosines of B anchors and M candidates.
        positives (`torch.LongTensor` of shape `(B,)`): each anchor's own column.
        temperature (`float`): dimensionless, within `TEMPERATURE_RANGE`.
        mask (`torch.BoolTensor` of shape `(B, M)`, *optional*): True for candidates to leave out.

    Returns:
        `torch.Tensor` of shape `()`: mean nats an anchor.

    Raises:
        ValueError: the temperature or a column is out of range.
    """
    check_temperature(temperature)
    if not 0 <= int(positives.min()) <= int(positives.max()) < scores.shape[1]:
        raise ValueError(f"positives must be columns from 0 to {scores.shape[1] - 1}, got {positives.tolist()}")
    logits = scores / temperature
    if mask is not None:
        logits.masked_fill_(mask, float("-inf"))
    return F.cross_entropy(logits, positives)


def symmetric_info_nce(
    queries,
    targets,
    negatives=None,
    negatives_valid=None,
    temperature=0.03,
    identical_tolerance=1e-5,
    margin=0.1,
    gather=gather_with_grad,
    symmetric=True,
    contents=None,
):
    """Symmetric InfoNCE over in-batch, cross-device and hard negatives (arXiv 2510.27571, eq. 1).

    Args:
        queries (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        targets (`torch.Tensor` of shape `(B, D)`): L2-normalised; row i is the positive of query i.
        negatives (`torch.Tensor` of shape `(B, N, D)`, *optional*): L2-normalised hard negatives, N the same on every
            rank.
        negatives_valid (`torch.BoolTensor` of shape `(B, N)`, *optional*): False for a slot that holds no negative
            because its row has fewer than N. Default: all are valid.
        temperature (`float`, defaults to 0.03): within `TEMPERATURE_RANGE`.
        identical_tolerance, margin (`float`, *optional*): see [`false_negatives`]; both rules hold in both directions.
        gather (`Callable`, defaults to [`gather_with_grad`]): joins the ranks' rows; `lambda rows: rows` keeps to this
            rank's negatives.
        symmetric (`bool`, defaults to `True`): False leaves the direction y -> q out of the loss, for ablations.
        contents (`tuple` of `torch.LongTensor`, *optional*): of queries `(B,)`, targets `(B,)` and negatives `(B, N)`
            a number that equal contents share on all ranks. Dropout embeds one content unlike on two ranks: by these
            numbers the rule `identical_tolerance` finds it all the same.

    Returns:
        [`ContrastiveOutput`]. The mean of the ranks' losses is the loss of the joined batch.

    Raises:
        ValueError: shapes do not agree or the temperature is out of range.
    """
    check_temperature(temperature)
    _check_shapes(queries, targets, negatives, negatives_valid)
    size = len(queries)
    all_queries, all_targets = gather(queries), gather(targets)
    rank = dist.get_rank() if len(all_queries) > size else 0
    positives = torch.arange(size, device=queries.device) + rank * size

    candidates, empty = all_targets, None
    same_query, same_target = None, None
    if contents is not None and identical_tolerance is not None:
        same_query, same_target = (each[:, None] == gather(each) for each in contents[:2])
    if negatives is not None and negatives.shape[1]:
        if negatives_valid is None:
            negatives_valid = torch.ones(negatives.shape[:2], dtype=torch.bool, device=negatives.device)
        candidates = torch.cat([all_targets, gather(negatives).flatten(0, 1)])
        empty = torch.cat(
            [
                torch.zeros(len(all_targets), dtype=torch.bool, device=queries.device),
                ~gather(negatives_valid).flatten(),
            ]
        )
        if same_target is not None:
            same_target = torch.cat([same_target, contents[1][:, None] == gather(contents[2]).flatten()], dim=1)

    forward_scores = queries @ candidates.T
    backward_scores = targets @ all_queries.T
    with torch.no_grad():
        rules = (identical_tolerance, margin)
        forward_mask = false_negatives(forward_scores, positives, candidates, targets, *rules, same_target)
        backward_mask = false_negatives(backward_scores, positives, all_queries, queries, *rules, same_query)
        real = torch.ones_like(forward_mask) if empty is None else (~empty).expand_as(forward_mask)
        masked = (forward_mask & real).sum() + backward_mask.sum()
        possible = real.sum() - size + backward_mask.numel() - size
        forward_mask |= ~real
        positive_scores = forward_scores.gather(1, positives[:, None])
        rivals = forward_scores.masked_fill(forward_mask.scatter(1, positives[:, None], True), float("-inf"))
        relevance = (forward_scores * real).sum() / real.sum()
        negative_gap = (rivals - positive_scores).max()
        del rivals, real  # as large as the scores, of which a large batch has enough

    loss = info_nce(forward_scores, positives, temperature, forward_mask)
    if symmetric:
        loss = 0.5 * (loss + info_nce(backward_scores, positives, temperature, backward_mask))
    return ContrastiveOutput(
        loss=loss,
        positive_score=positive_scores.mean(),
        relevance=relevance,
        negative_gap=negative_gap,
        masked=masked / possible.clamp(min=1),
    )


def matryoshka_info_nce(queries, targets, negatives=None, negatives_valid=None, dims=(), **settings):
    """The objective at full size, or its mean over prefixes of the embeddings (Matryoshka, arXiv 2205.13147).

    Args:
        queries, targets, negatives, negatives_valid: see [`symmetric_info_nce`].
        dims (sequence of `int`): sizes of the prefixes, each cut off and L2-normalised anew, all of equal weight
            beside the full size. None: the full size alone.
        settings: further arguments of [`symmetric_info_nce`].

    Returns:
        [`ContrastiveOutput`]: the mean loss; all else at full size.

    Raises:
        ValueError: a prefix is not shorter than the embeddings.
    """
    full = symmetric_info_nce(queries, targets, negatives, negatives_valid, **settings)
    if not dims:
        return full
    longest = max(dims)
    if longest >= queries.shape[1]:
        raise ValueError(f"matryoshka_dims must be below the embedding's {queries.shape[1]}, got {longest}")
    losses = [full.loss]
    for size in dims:
        cut = [
            None if rows is None else F.normalize(rows[..., :size], dim=-1) for rows in (queries, targets, negatives)
        ]
        losses.append(symmetric_info_nce(*cut, negatives_valid, **settings).loss)
    return full._replace(loss=torch.stack(losses).mean())


def _check_shapes(queries, targets, negatives, negatives_valid):
    if queries.ndim != 2 or queries.shape != targets.shape or not len(queries):
        raise ValueError(
            f"queries and targets must both be (B, D), got {tuple(queries.shape)} and {tuple(targets.shape)}"
        )
    if negatives is None:
        return
    if negatives.ndim != 3 or (negatives.shape[0], negatives.shape[2]) != tuple(queries.shape):
        raise ValueError(f"negatives must be (B, N, D) beside queries {tuple(queries.shape)}, got {negatives.shape}")
    if negatives_valid is not None and negatives_valid.shape != negatives.shape[:2]:
        raise ValueError(
            f"negatives_valid must be {tuple(negatives.shape[:2])}, as negatives, got {tuple(negatives_valid.shape)}"
        )
