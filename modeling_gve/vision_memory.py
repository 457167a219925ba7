"""What a frozen vision tower makes of a medium, computed once and kept: the same picture gives the same features.

Training with a frozen tower (the paper's) shows it the same media again in every epoch, in every probe, and in every
run of a sweep. On a CPU a picture is recognised far faster than it is seen. On a GPU its pixels would have to come
back for that, and the tower is a small part of a step: not done there.
"""

import hashlib
import os
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures


# Not in the paper: features kept in RAM; 60,000 videos of gve-mini. What comes later is computed each time.
LIMIT_BYTES = 2**31
# Not in the paper: media of one shape that are computed at once, in half the time of one by one.
TOGETHER = 8


class VisionMemory:
    """Stands in for the `forward` of a frozen tower on a CPU; its parameters and state dict stay as they are.

    Features depend on nothing but the medium: media of one shape are computed [`TOGETHER`] at a time only where the
    first such group has the same bits as its members alone; all others one at a time.

    Args:
        visual (`nn.Module`): transformers' vision tower of Qwen2.5-VL or Qwen3-VL, changed in place.
        folder (`str` or `os.PathLike`): where [`VisionMemory.save`] keeps features, apart for each tower.
        limit_bytes (`int`, *optional*): most bytes of features in memory.

    Raises:
        ValueError: the tower learns, or is not on a CPU.
    """

    def __init__(self, visual, folder, limit_bytes=LIMIT_BYTES):
        if any(parameter.requires_grad for parameter in visual.parameters()):
            raise ValueError("only a frozen vision tower can be remembered: set freeze_vision, or train by LoRA")
        device = next(visual.parameters()).device
        if device.type != "cpu":
            raise ValueError(f"a vision tower is remembered on CPUs only, this one is on {device}")
        self._compute, self._limit = visual.forward, limit_bytes
        self._output = (
            BaseModelOutputWithDeepstackFeatures
            if hasattr(visual, "deepstack_visual_indexes")
            else BaseModelOutputWithPooling
        )
        self.folder = Path(folder) / f"vision-{_digest(visual)}"
        self._features, self._new, self._bytes = {}, {}, 0
        self._same_together = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            for key, layers in load_file(path).items():
                self._remember(key, layers)
        visual.forward = self.forward

    def __len__(self):
        return len(self._features)

    @torch.no_grad()
    def forward(self, pixels, grid_thw, **kwargs):
        """As the tower's own, without `last_hidden_state`; see there."""
        parts = pixels.split(grid_thw.prod(1).tolist())
        keys = [_key(part, grid) for part, grid in zip(parts, grid_thw)]
        found = {key: self._features[key] for key in keys if key in self._features}
        unseen = {}
        for key, part, grid in zip(keys, parts, grid_thw):
            if key not in found:
                unseen.setdefault(tuple(grid.tolist()), {})[key] = part
        for shape, media in unseen.items():
            computed = self._compute_media(list(media.values()), torch.tensor([shape]), kwargs)
            for key, layers in zip(media, computed):
                found[key] = layers
                if self._remember(key, layers):
                    self._new[key] = layers
        pooled, *deep = torch.cat([found[key] for key in keys], dim=1)
        output = self._output(pooler_output=pooled)
        if deep:
            output.deepstack_features = deep
        return output

    def save(self):
        """Keep what is new on disk, in one file that is written whole or not at all."""
        if not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex[:12]
        temporary = self.folder / f".{name}.tmp"
        save_file(self._new, temporary)
        os.replace(temporary, self.folder / f"{name}.safetensors")
        self._new = {}

    def _compute_media(self, media, grid, kwargs):
        """Each one's merged features and, below them, those of the deepstack layers: `(1 + layers, tokens, D)`."""

        def compute(group):
            output = self._compute(torch.cat(group), grid_thw=grid.repeat(len(group), 1), **kwargs)
            deep = output.deepstack_features if "deepstack_features" in output else None
            layers = torch.stack([output.pooler_output, *(deep or ())])
            return [each.clone() for each in layers.chunk(len(group), dim=1)]  # clones: a file takes no views

        case = *grid[0].tolist(), torch.get_num_threads()
        if len(media) >= TOGETHER and case not in self._same_together:
            group = media[:TOGETHER]
            alone = [layers for each in group for layers in compute([each])]
            self._same_together[case] = all(map(torch.equal, compute(group), alone))
        size = TOGETHER if self._same_together.get(case) else 1
        whole = len(media) - len(media) % size
        groups = [media[k : k + size] for k in range(0, whole, size)] + [[each] for each in media[whole:]]
        return [layers for group in groups for layers in compute(group)]

    def _remember(self, key, layers):
        if key in self._features or self._bytes + layers.nbytes > self._limit:
            return False
        self._features[key] = layers
        self._bytes += layers.nbytes
        return True


def _key(pixels, grid):
    """What tells a medium from all others."""
    key = hashlib.sha256(pixels.contiguous().numpy())
    key.update(repr(grid.tolist()).encode())
    return key.hexdigest()[:32]


def _digest(visual):
    """Twelve digits that tell towers apart: every weight counts."""
    digest = hashlib.sha256(repr(visual.config.to_dict()).encode())
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
