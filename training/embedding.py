"""Embeddings by the weights that are being trained, or by a prober."""

import torch

from training.passes import align_passes


class Encoder(torch.nn.Module):
    """A model that embeds several padded batches in one call, as data-parallel wrappers need it.

    FSDP makes a unit of each of its decoder layers, of whichever backbone; see `accelerate/fsdp2.yaml`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = [type(model.backbone.language_model.layers[0]).__name__]  # accelerate reads it

    def forward(self, groups):
        """Embeddings of all groups, concatenated: `(M, D)`."""
        return torch.cat([self.model(**group).embeddings for group in groups])


def embed_items(run, encoder, items):
    """Embeddings of prepared items in their order, `(len(items), D)`."""
    groups, places = run.collator.forward_groups(items, run.training.micro_batch_size)
    groups = [dict(group) for group in groups]
    if run.sharded:
        groups, places = align_passes(groups, places, run.accelerator, run.processor)
    device = run.accelerator.device
    return encoder([to_device(group, device) for group in groups])[places.to(device)]


def to_device(group, device):
    """Model inputs on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in group.items()}


@torch.no_grad()
def embed_sides(run, encoder, sides, store, prober=None):
    """Embeddings of sides by the prober, or by the current weights without one.

    Args:
        run ([`Run`]): see there.
        encoder ([`Encoder`]): unwrapped and in evaluation mode.
        sides (list of `([`Side`], str or None)`): content and instruction. Where weights are sharded every rank must
            call with as many.
        store ([`FrameStore`]): of their media.
        prober (*optional*): as in [`Run`].

    Returns:
        `torch.Tensor` of shape `(len(sides), D)`, on the CPU.
    """
    if prober is None:
        return embed_items(run, encoder, [run.collator.prepare(*side, store=store) for side in sides]).cpu()
    return prober.encode([run.collator.item(*side, store=store) for side in sides])


def inner(run, encoder):
    """The encoder without the wrapper that joins ranks, which may need unlike numbers of passes here."""
    return encoder if run.sharded else run.accelerator.unwrap_model(encoder)
