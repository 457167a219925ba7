"""The rendered world: seeded scene graphs of coloured shapes that move, turn, grow and collide before a moving camera.

A `Film` is one or several `Scene`s in a row; a scene is a graph of `Thing`s, `Event`s and camera moves. Everything
else, pixels (`render.py`), texts (`texts.py`) and right answers (`oracle.py`), follows from the graph, so each
question has a provable answer.

Not in the paper: the whole world. It stands in for web video, so that every step of the project runs without a
download.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


COLOURS = {
    "red": (225, 25, 25),
    "orange": (255, 135, 0),
    "yellow": (255, 230, 0),
    "green": (0, 165, 40),
    "cyan": (0, 220, 230),
    "blue": (30, 60, 245),
    "purple": (140, 35, 200),
    "pink": (255, 125, 195),
}
WARM = {"red", "orange", "yellow", "pink"}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
TURNABLE = ("square", "triangle", "star", "cross", "diamond", "heart")  # turning a circle shows nothing
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
COLUMNS = ("left", "center", "right")
ROWS = ("top", "middle", "bottom")
MOVES = ("left", "right", "up", "down")
ACTIONS = (*MOVES, "grow", "shrink", "clockwise", "counterclockwise", "hit")
CAMERAS = (
    "static",
    "pan left",
    "pan right",
    "tilt up",
    "tilt down",
    "zoom in",
    "zoom out",
    "roll clockwise",
    "roll counterclockwise",
)
THEMES = ("night", "ocean", "forest", "desert", "snow", "sunset", "meadow", "city")
STYLES = ("bright", "dim", "misty", "spotlit")

FPS = 6
MIN_FRAMES, MAX_FRAMES = 14, 20  # a scene's length, 2.3 to 3.3 s
TEST_SHARE = 3  # one scene in three belongs to the benchmark, the others to training


@dataclass(frozen=True)
class Thing:
    """`count` equal shapes side by side, that act as one."""

    colour: str
    shape: str
    size: str
    texture: str
    count: int
    column: int
    row: int

    @property
    def name(self):
        return self.colour, self.shape


@dataclass(frozen=True)
class Event:
    """What the thing `actor` does; `target` is the thing that it hits."""

    actor: int
    action: str
    target: int | None = None


@dataclass(frozen=True)
class Scene:
    """One uncut shot. With two events the first fills the first half and the second the other; so do the two camera
    moves.
    """

    theme: str
    style: str
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    camera: tuple[str, str]
    frames: int
    seed: int  # of the landmarks in the background, which no text mentions

    @property
    def graph(self):
        """All that a text may speak of, in an order of its own (no landmarks, no length)."""
        return (self.theme, self.style, self.things, self.events, self.camera)

    @property
    def is_test(self):
        """Whether the benchmark owns this scene: told by what it shows, whatever moves in it."""
        digest = hashlib.blake2b(repr((self.theme, self.style, self.things)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % TEST_SHARE == 0

    @property
    def mood(self):
        return ("calm", "lively", "busy")[min(2, len(self.events) + (self.camera != ("static", "static")))]

    @property
    def palette(self):
        warm = {thing.colour in WARM for thing in self.things}
        return "mixed" if len(warm) == 2 else "warm" if warm.pop() else "cool"


@dataclass(frozen=True)
class Film:
    """A video before it is rendered."""

    scenes: tuple[Scene, ...]

    @cached_property
    def _hash(self):
        return hash(self.scenes)

    def __hash__(self):  # films are keys of large caches
        return self._hash

    @property
    def frames(self):
        return sum(scene.frames for scene in self.scenes)


def generator(*keys):
    """A NumPy generator that depends on the keys alone, whatever was drawn before and in whichever process."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def room_to_move(thing, action):
    """Whether the thing stays in the picture when it moves one column or row at least."""
    return {
        "left": thing.column > 0,
        "right": thing.column < 2,
        "up": thing.row > 0,
        "down": thing.row < 2,
    }.get(action, True)


def possible(things, event):
    """Whether the event can be seen: turning needs a shape with corners, moving needs room, hitting another thing."""
    thing = things[event.actor]
    if event.action in ("clockwise", "counterclockwise"):
        return thing.shape in TURNABLE
    if event.action == "hit":
        return event.target is not None and event.target != event.actor
    return room_to_move(thing, event.action)


def draw_things(rng, n):
    """`n` things with names and places of their own."""
    cells = rng.permutation(9)[:n]
    things, names = [], set()
    for cell in cells:
        while True:
            colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
            if (colour, shape) not in names:
                break
        names.add((colour, shape))
        count = int(rng.choice([1, 1, 1, 2, 3]))
        things.append(
            Thing(
                colour,
                shape,
                "small" if count > 1 else pick(rng, SIZES),
                pick(rng, TEXTURES),
                count,
                int(cell) % 3,
                int(cell) // 3,
            )
        )
    return tuple(things)


def draw_event(rng, things, actor=None, actions=ACTIONS):
    """One visible event, or None where the actor can do none of the actions."""
    for _ in range(32):
        who = int(rng.integers(len(things))) if actor is None else actor
        action = pick(rng, actions)
        target = None
        if action == "hit" and len(things) > 1:
            target = int(rng.choice([i for i in range(len(things)) if i != who]))
        event = Event(who, action, target)
        if possible(things, event):
            return event
    return None


def draw_events(rng, things, n):
    """Up to `n` events in order, by different things where there are several (a thing's second move would hide its
    first).
    """
    order = rng.permutation(len(things))
    events = []
    for k in range(n):
        actor = int(order[k % len(things)])
        event = draw_event(rng, things, actor)
        if event is not None and all(event.action != other.action or event.actor != other.actor for other in events):
            events.append(event)
    # Whatever is hit gets knocked away: it has no event of its own.
    hit = {event.target for event in events if event.action == "hit"}
    return tuple(event for event in events if event.actor not in hit)


def draw_scene(rng, test, things=(1, 3), events=(1, 2), camera=0.3, two_moves=False):
    """A random scene of the benchmark's or of training's share of all graphs.

    Args:
        rng (`np.random.Generator`): the source of chance.
        test (`bool`): whether the graph belongs to the benchmark.
        things, events (`tuple[int, int]`): least and greatest number.
        camera (`float`): share of scenes with a moving camera, 0 to 1.
        two_moves (`bool`): the camera may do another thing in each half.
    """
    while True:
        drawn = draw_things(rng, int(rng.integers(things[0], things[1] + 1)))
        n_events = int(rng.integers(events[0], events[1] + 1))
        done = draw_events(rng, drawn, n_events)
        if len(done) < events[0]:
            continue
        move = pick(rng, CAMERAS[1:]) if rng.random() < camera else "static"
        moves = (move, pick(rng, CAMERAS)) if two_moves else (move, move)
        scene = Scene(
            pick(rng, THEMES),
            pick(rng, STYLES),
            drawn,
            done,
            moves,
            int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1)),
            int(rng.integers(2**31)),
        )
        if scene.is_test == test:
            return scene


def other(rng, options, current):
    return pick(rng, tuple(option for option in options if option != current))


OPPOSITE = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "grow": "shrink",
    "shrink": "grow",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
}


def change(rng, scene, attribute):
    """The scene with one attribute changed, or None where that cannot be.

    Args:
        rng (`np.random.Generator`): the source of chance.
        scene (`Scene`): left as it is.
        attribute (`str`): "colour", "shape", "texture", "place", "direction", "action", "order", "camera", "theme" or
        "style".
    """
    things, events = list(scene.things), list(scene.events)
    i = int(rng.integers(len(things)))
    if attribute in ("colour", "shape", "texture"):
        options = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES}[attribute]
        things[i] = replace(things[i], **{attribute: other(rng, options, getattr(things[i], attribute))})
    elif attribute == "place":
        taken = {(thing.column, thing.row) for thing in things}
        cell = pick(rng, [(c, r) for c in range(3) for r in range(3) if (c, r) not in taken])
        things[i] = replace(things[i], column=cell[0], row=cell[1])
    elif attribute in ("direction", "action"):
        if not events:
            return None
        k = int(rng.integers(len(events)))
        if events[k].action == "hit":
            return None
        options = ACTIONS[:-1] if attribute == "action" else (OPPOSITE[events[k].action],)
        events[k] = replace(
            events[k], action=other(rng, options, events[k].action) if attribute == "action" else options[0]
        )
    elif attribute == "order":
        if len(events) < 2:
            return None
        events.reverse()
    elif attribute == "camera":
        move = other(rng, CAMERAS[1:], scene.camera[0])
        scene = replace(scene, camera=(move, move) if scene.camera[0] == scene.camera[1] else (move, scene.camera[1]))
    elif attribute == "theme":
        scene = replace(scene, theme=other(rng, THEMES, scene.theme))
    elif attribute == "style":
        scene = replace(scene, style=other(rng, STYLES, scene.style))
    changed = replace(scene, things=tuple(things), events=tuple(events))
    sound = len({thing.name for thing in things}) == len(things) and all(possible(things, event) for event in events)
    return changed if sound and changed.graph != scene.graph or attribute in ("camera", "theme", "style") else None
