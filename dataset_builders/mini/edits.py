"""Composed queries: a reference picture or clip, and a text that says what is different in the clip looked for."""

from dataclasses import dataclass, replace

from dataset_builders.mini.texts import THEME_PHRASES
from dataset_builders.mini.world import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    THEMES,
    Event,
    Scene,
    change,
    draw_scene,
    pick,
    possible,
)


DOING = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "grow": "growing",
    "shrink": "shrinking",
    "clockwise": "turning clockwise",
    "counterclockwise": "turning counterclockwise",
}
FILMING = {
    "pan": "panning",
    "tilt": "tilting",
    "zoom": "zooming",
    "roll": "rolling",
}


@dataclass(frozen=True)
class Edit:
    kind: str  # "action", "camera", "colour" or "theme"
    value: str

    def text(self, rng):
        lead = pick(rng, ("The same, but", "The same scene, but"))
        if self.kind == "action":
            return f"{lead} {DOING[self.value]}."
        if self.kind == "camera":
            kind, _, way = self.value.partition(" ")
            return f"{lead} with the camera {FILMING[kind]} {way}."
        return f"{lead} {self.value if self.kind == 'colour' else pick(rng, THEME_PHRASES[self.value])}."

    def apply(self, scene: Scene):
        """The scene after the edit, or None where it changes nothing or can not be seen."""
        if self.kind == "action":
            edited = replace(scene, events=(Event(0, self.value),))
            if not possible(edited.things, edited.events[0]):
                return None
        elif self.kind == "camera":
            edited = replace(scene, camera=(self.value, self.value))
        elif self.kind == "colour":
            edited = replace(scene, things=(replace(scene.things[0], colour=self.value), *scene.things[1:]))
        else:
            edited = replace(scene, theme=self.value)
        return None if edited.graph == scene.graph else edited


def draw_edits(rng):
    actions = rng.permutation(ACTIONS[:-1])[:3]
    edits = [Edit("action", str(action)) for action in actions]
    edits.append(Edit("camera", pick(rng, CAMERAS[1:])))
    edits.append(Edit("colour", pick(rng, tuple(COLOURS))))
    edits.append(Edit("theme", pick(rng, THEMES)))
    return edits


def draw_references(rng, test):
    """Four scenes of one thing each; three differ in one attribute only."""
    while True:
        scene = draw_scene(rng, test, things=(1, 1), events=(1, 1), camera=0.0)
        references = [scene]
        for attribute in ("texture", "shape", "style"):
            for _ in range(12):
                changed = change(rng, scene, attribute)
                if changed is not None and changed.is_test == test:
                    references.append(changed)
                    break
        references.append(draw_scene(rng, test, things=(1, 1), events=(1, 1), camera=0.0))
        if len({reference.graph for reference in references}) >= 4:
            return references[:3] + references[-1:]


def draw_family(rng, test, size=10):
    """`size` clips that can only be told apart by reference and text together.

    Each clip is a reference after an edit; another clip shares its reference and yet another its edit, so neither part
    of the query is enough.

    Returns:
        `list[tuple[Scene, Edit, Scene]]`: reference, edit, clip.
    """
    while True:
        references, edits = draw_references(rng, test), draw_edits(rng)
        cells = []
        for reference in references:
            for edit in edits:
                clip = edit.apply(reference)
                if clip is not None and clip.is_test == test:
                    cells.append((reference, edit, clip))
        cells = [cells[i] for i in rng.permutation(len(cells))]
        while len(cells) > size:
            # Drop a clip whose reference and edit both stay shared.
            spare = [cell for cell in cells if _shared(cell, cells, 0) > 2 and _shared(cell, cells, 1) > 2]
            cells.remove(spare[0] if spare else cells[0])
        shared = all(_shared(cell, cells, part) > 1 for cell in cells for part in (0, 1))
        if len(cells) == size and shared and len({cell[2].graph for cell in cells}) == size:
            return cells


def _shared(cell, cells, part):
    return sum(other[part] == cell[part] for other in cells)
