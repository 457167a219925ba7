"""Batches of an epoch in the order of its draws, prepared ahead of the steps by worker processes if asked."""

import time
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset


class LoadedBatch(NamedTuple):
    """A batch as a training step takes it.

    Attributes:
        groups (list of `dict`): model inputs of each forward pass.
        places (`torch.LongTensor` of shape `(M,)`): where each item's row stands in the passes' concatenated outputs.
        queries, targets (`torch.LongTensor` of shape `(B,)`), negatives (`(B, N)`): items.
        negatives_valid (`torch.BoolTensor` of shape `(B, N)`): which slots hold a negative.
        contents (`torch.LongTensor` of shape `(M,)`): see [`PairBatch`].
        cursor (`dict`, *optional*): of the task's stream, see [`Drawn`].
    """

    groups: list
    places: torch.Tensor
    queries: torch.Tensor
    targets: torch.Tensor
    negatives: torch.Tensor
    negatives_valid: torch.Tensor
    contents: torch.Tensor
    cursor: dict | None


class _PlannedBatches(Dataset):
    def __init__(self, collator, streams, micro_batch_size, plan):
        self._collator, self._streams, self._plan = collator, streams, plan
        self._micro_batch_size = micro_batch_size

    def __len__(self):
        return len(self._plan)

    def __getitem__(self, number):
        task, index = self._plan[number]
        stream = self._streams[task]
        drawn = stream.draw(index)
        batch = self._collator.batch(drawn.pairs, drawn.negatives, stream.hard_negatives, drawn.store)
        groups, places = self._collator.forward_groups(batch.items, self._micro_batch_size)
        groups = [dict(group) for group in groups]
        _, *rest = batch
        return LoadedBatch(groups, places, *rest, drawn.cursor)


def _as_it_is(batch):
    return batch


def load_batches(collator, streams, plan, micro_batch_size=None, workers=0, pin_memory=False):
    """Yield the batches of a plan, in its order.

    Args:
        collator ([`PairCollator`]): from pairs to inputs.
        streams (`dict[str, PairStream]`): batches of each task by number.
        plan (list of `(str, int)`): task and number of each batch.
        micro_batch_size (`int`, *optional*): most items of a forward pass.
        workers (`int`): processes that prepare batches; what they yield does not depend on their number.
        pin_memory (`bool`): for copies to a GPU.

    Yields:
        `tuple` of a [`LoadedBatch`] and the seconds that the caller waited for it.
    """
    loader = DataLoader(
        _PlannedBatches(collator, streams, micro_batch_size, plan),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that starting a loader leaves dropout's random state alone
    )
    batches, waiting = iter(loader), time.monotonic()
    for batch in batches:
        yield batch, time.monotonic() - waiting
        waiting = time.monotonic()
