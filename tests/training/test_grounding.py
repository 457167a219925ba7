"""The dense targets of pretraining follow the scene graph, and the head's loss has a closed form."""

import math

import numpy as np
import pytest
import torch

from dataset_builders.mini.world import COLOURS, Event, Scene, Thing
from training.grounding import GRID, N_SHOWN, SHOWN, WHOLE, GroundingHead, cover, targets


def scene(events=(), camera=("static", "static"), column=0, row=0):
    thing = Thing("red", "circle", "large", "solid", 1, column, row)
    return Scene("ocean", "bright", (thing,), events, camera, 14, 0)


def covers_of(scene):
    return np.stack([cover(scene, k / 7) for k in range(8)])


@pytest.mark.parametrize(("column", "row"), [(0, 0), (2, 0), (0, 2), (2, 2)])
def test_a_thing_is_seen_in_its_own_corner(column, row):
    shown, whole = targets(scene(column=column, row=row), covers_of(scene(column=column, row=row))[:1], still=True)
    seen = shown[:, list(COLOURS).index("red")] == 1
    assert seen.any()
    assert {r // 2 for r in whole[seen, 0]} == {row // 2}
    assert {c // 2 for c in whole[seen, 1]} == {column // 2}
    assert not shown[~seen].any()
    assert (shown[seen].sum(1) == len(SHOWN)).all()  # one colour, one shape, one texture, one size, one count
    assert (whole[:, 4] == -100).all()  # a picture can not tell the camera


def test_an_action_is_told_while_it_lasts():
    two = scene(events=(Event(0, "right"), Event(0, "grow")))
    shown, whole = targets(two, covers_of(two), still=False)
    acts = shown.reshape(4, GRID**2, N_SHOWN)[..., -9:].max(axis=1)
    assert acts[:, 1].tolist() == [1, 1, 0, 0]  # "right" in the first half
    assert acts[:, 4].tolist() == [0, 0, 1, 1]  # "grow" in the second
    assert acts.sum() == 4


def test_the_camera_is_told_by_halves():
    moved = scene(camera=("pan left", "zoom in"))
    whole = targets(moved, covers_of(moved), still=False)[1].reshape(4, GRID**2, len(WHOLE))
    assert whole[:, 0, 4].tolist() == [1, 1, 5, 5]


def test_a_blank_head_pays_the_entropy_of_all_targets():
    head = GroundingHead(8)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    shown, whole = map(torch.from_numpy, targets(scene(), covers_of(scene()), still=False))
    expected = N_SHOWN * math.log(2) + sum(map(math.log, WHOLE.values()))
    assert head(torch.randn(64, 8), shown, whole).item() == pytest.approx(expected, rel=1e-5)
