"""From a scene graph to pixels, and from pixels to H.264 in MP4 through PyAV.

Frames are drawn at 112 x 112; gve-mini sees them at 56 x 56. Each shape is a test on local coordinates (u, v), so
turning, growing and a moving camera are only changes of coordinates.
"""

import io
import os
from functools import cache, lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataset_builders.mini.world import COLOURS, FPS, Film, Scene, generator


SIDE = 112  # pixels
TILE = 224  # side of the background, which repeats
RADIUS = {"small": 10.0, "large": 17.0}
GROUP_RADIUS, GROUP_STEP = 9.0, 20.0  # several shapes side by side
CELLS = (0.23, 0.5, 0.77)

# theme: (ground, landmarks, landmarks' shape)
GROUNDS = {
    "night": ((12, 12, 42), (235, 235, 235), "dot"),
    "ocean": ((28, 72, 120), (110, 160, 200), "dash"),
    "forest": ((22, 52, 30), (70, 110, 60), "triangle"),
    "desert": ((205, 182, 132), (150, 120, 80), "dot"),
    "snow": ((228, 232, 238), (165, 180, 200), "triangle"),
    "sunset": ((120, 62, 84), (225, 150, 110), "dash"),
    "meadow": ((150, 188, 132), (245, 245, 215), "dot"),
    "city": ((105, 105, 110), (50, 50, 55), "block"),
}


def shape_mask(shape, u, v):
    """Whether each point lies in the shape of radius 1; `v` grows downwards."""
    if shape == "circle":
        return u * u + v * v < 1
    if shape == "ring":
        r = u * u + v * v
        return (r < 1) & (r > 0.3)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.85
    if shape == "diamond":
        return np.abs(u) * 1.4 + np.abs(v) < 1.1
    if shape == "triangle":
        return (v < 0.75) & (np.abs(u) * 1.75 < v + 1)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.minimum(a, b) < 0.32) & (np.maximum(a, b) < 1)
    if shape == "star":
        return np.hypot(u, v) < 0.72 + 0.38 * np.cos(5 * np.arctan2(u, -v))
    if shape == "heart":
        return u * u * 1.1 + (0.55 * np.sqrt(np.abs(u)) - 1.05 * v - 0.15) ** 2 < 0.75
    raise ValueError(f"Unknown shape {shape!r}.")


@lru_cache(maxsize=256)
def background(theme, seed):
    """`(TILE, TILE, 3)` float32: the ground with 36 landmarks, without which a moving camera could not be told."""
    ground, mark, kind = GROUNDS[theme]
    rng = generator("background", seed)
    tile = np.empty((TILE, TILE, 3), np.float32)
    tile[:] = ground
    reach = np.arange(-14, 15)
    for cx, cy, size in zip(rng.integers(TILE, size=36), rng.integers(TILE, size=36), rng.uniform(3, 7, 36)):
        u, v = reach[None, :], reach[:, None]
        if kind == "dot":
            mask = u * u + v * v < (0.7 * size) ** 2
        elif kind == "dash":
            mask = (np.abs(u) < 1.8 * size) & (np.abs(v) < 0.35 * size)
        elif kind == "triangle":
            mask = (v < size) & (v > -size) & (np.abs(u) * 2 < v + size)
        else:
            mask = (np.abs(u) < size) & (np.abs(v) < 1.2 * size)
        rows, columns = np.nonzero(mask)
        tile[(rows - 14 + cy) % TILE, (columns - 14 + cx) % TILE] = mark
    return tile


def progress(k, n_slots, time):
    """How far, 0 to 1, the `k`-th of `n_slots` parts of the scene has come at `time` (0 to 1)."""
    return float(np.clip(time * n_slots - k, 0.0, 1.0))


def camera_at(scene, time):
    """Centre of view in pixels from the middle, zoom factor and roll in radians."""
    dx = dy = roll = 0.0
    zoom = 1.0
    first, second = scene.camera
    moves = (
        [(first, progress(0, 1, time))]
        if first == second
        else [(first, progress(0, 2, time)), (second, progress(1, 2, time))]
    )
    reach = 0.36 if first == second else 0.26
    for move, p in moves:
        kind, _, way = move.partition(" ")
        if kind == "pan":
            dx += (-1 if way == "left" else 1) * reach * SIDE * p
        elif kind == "tilt":
            dy += (-1 if way == "up" else 1) * reach * SIDE * p
        elif kind == "zoom":
            zoom *= (1 + 0.7 * p) if way == "in" else 1 / (1 + 0.7 * p)
        elif kind == "roll":
            # A camera that rolls clockwise turns its picture the other way.
            roll += (1 if way == "clockwise" else -1) * np.radians(50) * p
    return dx, dy, zoom, roll


def things_at(scene, time):
    """For each thing `[x, y, scale, angle]`: pixels from the middle of the picture, factor, radians."""
    places = [[(CELLS[t.column] - 0.5) * SIDE, (CELLS[t.row] - 0.5) * SIDE, 1.0, 0.0] for t in scene.things]
    ends = {"left": (0, CELLS[0]), "right": (0, CELLS[2]), "up": (1, CELLS[0]), "down": (1, CELLS[2])}
    for k, event in enumerate(scene.events):
        p = progress(k, len(scene.events), time)
        place = places[event.actor]
        if event.action in ends:
            axis, end = ends[event.action]
            place[axis] += p * ((end - 0.5) * SIDE - place[axis])
        elif event.action == "grow":
            place[2] *= 1 + 0.9 * p
        elif event.action == "shrink":
            place[2] *= 1 - 0.6 * p
        elif event.action in ("clockwise", "counterclockwise"):
            place[3] += (1 if event.action == "clockwise" else -1) * np.radians(200) * p
        elif event.action == "hit":
            struck = places[event.target]
            gap = np.array(struck[:2]) - place[:2]
            way = gap / np.linalg.norm(gap)
            touch = np.array(struck[:2]) - way * 22
            # Two thirds of the time to get there, one third for the blow.
            go, blow = min(1.0, p * 1.5), max(0.0, p * 3 - 2)
            place[0], place[1] = np.array(place[:2]) + go * (touch - place[:2])
            struck[0], struck[1] = np.array(struck[:2]) + blow * way * 24
            struck[3] += blow * np.radians(60)
    return places


_Y, _X = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5) - SIDE / 2
_VIGNETTE = np.clip(1.3 - np.hypot(_X, _Y) / 60, 0.3, 1.0).astype(np.float32)[..., None]


def view(scene, time):
    """World coordinates `x, y` of each pixel `(SIDE, SIDE)`, as the camera sees them at `time`."""
    dx, dy, zoom, roll = camera_at(scene, time)
    cos, sin = np.cos(roll, dtype=np.float32), np.sin(roll, dtype=np.float32)
    x = (cos * _X - sin * _Y) / np.float32(zoom) + np.float32(dx)
    y = (sin * _X + cos * _Y) / np.float32(zoom) + np.float32(dy)
    return x, y


def painted(scene, time, x, y):
    """For each shape, back to front: the thing's index, the flat indices of its pixels, their `u`, `v`, its radius."""
    for i, (thing, (cx, cy, scale, angle)) in enumerate(zip(scene.things, things_at(scene, time))):
        radius = (GROUP_RADIUS if thing.count > 1 else RADIUS[thing.size]) * scale
        cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
        for j in range(thing.count):
            u = (x - np.float32(cx + (j - (thing.count - 1) / 2) * GROUP_STEP * scale)) / np.float32(radius)
            v = (y - np.float32(cy)) / np.float32(radius)
            near = (np.abs(u) < 1.3) & (np.abs(v) < 1.3)
            u, v = u[near], v[near]
            u, v = cos * u + sin * v, cos * v - sin * u
            inside = shape_mask(thing.shape, u, v)
            yield i, np.flatnonzero(near)[inside], u[inside], v[inside], radius


def owners(scene, time):
    """Which thing each pixel shows: `(SIDE, SIDE)` int8, -1 for the background."""
    owner = np.full(SIDE * SIDE, -1, np.int8)
    for i, where, *_ in painted(scene, time, *view(scene, time)):
        owner[where] = i
    return owner.reshape(SIDE, SIDE)


def render_frame(scene: Scene, time: float):
    """One picture of the scene at `time` (0 to 1): `(SIDE, SIDE, 3)` uint8."""
    x, y = view(scene, time)
    picture = background(scene.theme, scene.seed)[
        np.rint(y).astype(np.int32) % TILE, np.rint(x).astype(np.int32) % TILE
    ]
    for i, where, u, v, radius in painted(scene, time, x, y):
        thing = scene.things[i]
        paint = np.empty((len(u), 3), np.float32)
        paint[:] = COLOURS[thing.colour]
        pixels = radius * 1.0  # textures keep their width in pixels, so that they stay visible on small things
        if thing.texture == "striped":
            paint[((v * pixels) % 8) < 3.2] = 250
        elif thing.texture == "dotted":
            paint[np.hypot((u * pixels) % 8 - 4, (v * pixels) % 8 - 4) < 2.2] = 250
        picture.reshape(-1, 3)[where] = paint
    if scene.style == "dim":
        picture = picture * 0.6
    elif scene.style == "misty":
        picture = picture * 0.6 + 98
    elif scene.style == "spotlit":
        picture = picture * _VIGNETTE
    return picture.astype(np.uint8)


def frame_times(film: Film):
    """`[(scene, time in it)]` for each frame of the film."""
    return [(scene, k / (scene.frames - 1)) for scene in film.scenes for k in range(scene.frames)]


def render(film: Film, indices=None):
    """The film's frames, all or those at `indices`: `(T, SIDE, SIDE, 3)` uint8."""
    frames = frame_times(film)
    return np.stack([render_frame(*frames[i]) for i in (range(len(frames)) if indices is None else indices)])


@cache
def repeatable():
    """Options of libx264 that make it give the same bytes for the same frames.

    With its AVX-512 code two encodings in one process were seen to differ (x264 of PyAV 18.1; macroblock-tree rate
    control); with AVX2's, never.
    """
    processor = Path("/proc/cpuinfo")
    has_avx512 = processor.exists() and "avx512f" in processor.read_text()
    return {"x264-params": "asm=AVX2"} if has_avx512 else {}


def encode_mp4(frames, fps=FPS, crf=18):
    """H.264 in MP4; the same frames give the same bytes (one thread, no clock in the container)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "flags": "+bitexact", **repeatable()}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_png(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def render_mp4(film: Film):
    return encode_mp4(render(film))


def processes():
    return max(1, min(8, os.cpu_count() or 1))
