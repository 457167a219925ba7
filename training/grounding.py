"""What each visual token of `gve-mini-base` should know: the dense targets of its pretraining.

Captions alone teach a vision tower of this size too slowly: a caption names a thing's shape in one token of sixty, and
says nothing of where to look. Qwen2.5-VL's own pretraining holds much grounding beside captions; here the scene graph
gives it for free. A linear head on the merged visual tokens, thrown away after pretraining, tells for each token which
things it shows and what they do, where in the picture it lies, and the scene's theme, style and camera.

Not in the paper: all of it (its base came pretrained).
"""

import numpy as np
import torch.nn.functional as F
from torch import nn

from dataset_builders.mini.render import SIDE, owners
from dataset_builders.mini.world import ACTIONS, CAMERAS, COLOURS, SHAPES, SIZES, STYLES, TEXTURES, THEMES


GRID = 4  # merged tokens along each side of a frame
MIN_COVER = 0.06  # share of a token's pixels that a thing must cover to count as shown
# What the things in a token are like: any number of these hold.
SHOWN = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES, "size": SIZES, "count": (1, 2, 3)}
N_SHOWN = sum(map(len, SHOWN.values())) + len(ACTIONS)
# What holds of the token or of the picture as a whole: one of each.
WHOLE = {"row": GRID, "column": GRID, "theme": len(THEMES), "style": len(STYLES), "camera": len(CAMERAS)}


def cover(scene, time):
    """Which things each token of a frame shows: `(GRID * GRID,)` uint8, bit `i` for thing `i`."""
    tokens = owners(scene, time).reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).swapaxes(1, 2).reshape(GRID**2, -1)
    shares = [(tokens == i).mean(axis=1) >= MIN_COVER for i in range(len(scene.things))]
    return sum(share.astype(np.uint8) << i for i, share in enumerate(shares))


def targets(scene, covers, still):
    """Targets for the tokens of a film of one scene.

    Args:
        scene (`Scene`): the film's only scene.
        covers (`np.ndarray`): `(T, GRID * GRID)` uint8 of the `T` frames, from `cover`.
        still (`bool`): a picture, of the first frame; else each two frames make one row of tokens.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: `(N, N_SHOWN)` float32 of zeros and ones, and `(N, len(WHOLE))` int64 classes,
        -100 where a picture cannot tell; `N` is 16 for a picture and 64 for eight frames.
    """
    covers = covers[:1] if still else covers[0::2] | covers[1::2]
    frames = 2 * len(covers) - 1
    looks = [
        [
            value == (thing.count if name == "count" else getattr(thing, name))
            for name, values in SHOWN.items()
            for value in values
        ]
        for thing in scene.things
    ]
    shown = np.zeros((len(covers), GRID**2, N_SHOWN), np.float32)
    whole = np.full((len(covers), GRID**2, len(WHOLE)), -100, np.int64)
    whole[..., 0], whole[..., 1] = np.divmod(np.arange(GRID**2), GRID)
    whole[..., 2], whole[..., 3] = THEMES.index(scene.theme), STYLES.index(scene.style)
    for k in range(len(covers)):
        for i, look in enumerate(looks):
            acts = [not still and act in doing(scene, i, 2 * k / frames, (2 * k + 1) / frames) for act in ACTIONS]
            seen = (covers[k] >> i & 1).astype(bool)
            shown[k, seen] = np.maximum(shown[k, seen], np.array(look + acts, np.float32))
        if not still:
            whole[k, :, 4] = CAMERAS.index(scene.camera[2 * k >= len(covers)])
    return shown.reshape(-1, N_SHOWN), whole.reshape(-1, len(WHOLE))


def doing(scene, thing, start, stop):
    """What the thing does between two times, 0 to 1."""
    n = len(scene.events)
    return {
        event.action
        for k, event in enumerate(scene.events)
        if event.actor == thing and min(stop, (k + 1) / n) - max(start, k / n) > 0.02
    }


class GroundingHead(nn.Module):
    """A linear reading of the visual tokens `(N, hidden_size)`."""

    def __init__(self, hidden_size):
        super().__init__()
        self.linear = nn.Linear(hidden_size, N_SHOWN + sum(WHOLE.values()))

    def forward(self, tokens, shown, whole):
        """The mean over tokens of all targets' cross-entropies, summed: a scalar in nats."""
        shown_logits, *whole_logits = self.linear(tokens).split([N_SHOWN, *WHOLE.values()], dim=-1)
        loss = F.binary_cross_entropy_with_logits(shown_logits, shown, reduction="none").sum(-1).mean()
        for logits, classes in zip(whole_logits, whole.unbind(-1)):
            if (classes >= 0).any():
                loss = loss + F.cross_entropy(logits, classes)
        return loss
