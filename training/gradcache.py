"""Gradient caching: a contrastive step on a large batch in the memory of a small one (arXiv 2101.06983).

The batch is embedded group by group without a graph, the loss of all embeddings gives the gradient of each, and the
groups are embedded again, with a graph, to carry their parts of that gradient back. A group holds whole items, with
the patches of their own images and videos, so nothing has to be cut by `grid_thw` afterwards.
"""

import contextlib

import torch

from training.malloc import return_freed_memory


# On CPUs: the more passes, the more malloc has cut its heap into pieces that the next cannot use. To return them takes
# as long as a tenth of a pass.
PASSES_A_TRIM = 16


class RandomState:
    """The random state of this process and of one device, so that dropout draws the same masks twice."""

    def __init__(self, device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self):
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def cached_step(embed, groups, loss_of, backward, device, no_sync=contextlib.nullcontext):
    """Forward and backward of a loss over the embeddings of all groups.

    The last group keeps its graph and goes back first, so that it is embedded once only and no more than one graph
    exists at any time. The others follow from the last to the first: where groups grow, as those of
    [`PairCollator.forward_groups`] do, each finds room in the memory that the one before it has left.

    Args:
        embed (`Callable`): from a group to its embeddings, `(M_g, D)`, float32, with graph.
        groups (list): what `embed` takes, at least one; as many on every rank where weights are sharded.
        loss_of (`Callable`): from embeddings `(M, D)` to an output with a scalar `loss`; it may gather over ranks.
        backward (`Callable`): as `Accelerator.backward`.
        device (`torch.device`): where `embed` computes.
        no_sync (`Callable`): context for all passes but the last backward, whose gradients ranks need not join.

    Returns:
        what `loss_of` returned, detached from the model.
    """
    *others, largest = groups
    states, rows = [], []
    with torch.no_grad():
        for group in others:
            states.append(RandomState(device))
            rows.append(embed(group))
    trims = device.type == "cpu" and len(others) >= PASSES_A_TRIM
    if trims:
        return_freed_memory()  # what passes without a graph left, before the largest with one
    with no_sync() if others else contextlib.nullcontext():
        kept = embed(largest)
        after = RandomState(device)
        embeddings = torch.cat([*rows, kept.detach()]).requires_grad_()
        output = loss_of(embeddings)
        output.loss.backward()
        *gradients, gradient = embeddings.grad.split([len(part) for part in (*rows, kept)])
        backward((kept * gradient).sum())
    del kept
    for number, (group, state, gradient) in reversed(list(enumerate(zip(others, states, gradients)))):
        state.restore()
        if trims and (len(others) - number) % PASSES_A_TRIM == 1:
            return_freed_memory()
        with no_sync() if number else contextlib.nullcontext():
            backward((embed(group) * gradient).sum())
    after.restore()
    return output
