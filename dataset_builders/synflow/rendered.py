"""Rendered videos as a source of the flow: films with noisy captions, and faults planted in known ways.

A film follows from the recipe's seed and its number, so that whoever has both can read its scene graph.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dataset_builders.mini.pairs import noisy
from dataset_builders.mini.render import encode_mp4, render, render_frame
from dataset_builders.mini.texts import describe, keyword_set
from dataset_builders.mini.world import Film, change, draw_scene, generator, pick


# fault: the reason for which it has to be dropped
FAULTS = {
    "wrong caption": "text_does_not_match",
    "static": "video_static",
    "broken file": "video_unreadable",
    "duplicate": "video_duplicate",
    "boilerplate text": "text_boilerplate",
}
BOILERPLATE_TEXTS = (
    "Subscribe to my channel for more videos!!",
    "Please like, share and subscribe, click the bell below",
    "official video (full hd) link in the description",
    "Follow us on instagram for more free stock footage videos",
)


class Rendered(NamedTuple):
    """A video of the source before rendering."""

    film: Film
    text: str
    fault: str | None


def draw_film(seed, number):
    """Singles, siblings of the film before (one attribute changed) and stories of several shots."""
    if number % 5 == 1:
        before = draw_film(seed, number - 1)
        rng = generator("synflow sibling", seed, number)
        for attribute in rng.permutation(["theme", "camera", "theme"]):
            changed = change(rng, before.scenes[0], str(attribute))
            if changed is not None and not changed.is_test:
                return Film((changed,))
    rng = generator("synflow film", seed, number)
    if number % 5 == 4:
        return Film(tuple(draw_scene(rng, False, (1, 2), (1, 1), camera=0.0) for _ in range(2)))
    return Film((draw_scene(rng, False, (1, 3), (1, 2), camera=0.45, two_moves=rng.random() < 0.3),))


def has_fault(source, seed, number):
    """Every k-th video is bad, faults in turn; which, depends on the seed."""
    if not source.faults:
        return None
    step = round(1 / source.faults)
    offset = int(generator("synflow faults", seed).integers(step))
    return list(FAULTS)[number // step % len(FAULTS)] if number % step == offset else None


@lru_cache(maxsize=4096)
def draw_video(source, seed, number):
    """The `number`-th video of a [`RenderedSource`]."""
    film = draw_film(seed, number)
    fault = has_fault(source, seed, number)
    rng = generator("synflow caption", seed, number)
    style = "paragraph" if len(film.scenes) > 1 else "coarse"
    text = describe(rng, film, style).text
    if fault == "duplicate":
        origin = number - 1
        while has_fault(source, seed, origin):
            origin -= 1
        film, text = draw_film(seed, origin), draw_video(source, seed, origin).text
    elif fault == "wrong caption":
        text = _caption_of_another(rng, film, style)
    elif fault == "boilerplate text":
        text = pick(rng, BOILERPLATE_TEXTS)
    else:
        while True:  # the web's noise, but no wrong caption: that is a fault
            heard = noisy(rng, text, ("",))
            if heard:
                text = heard
                break
    return Rendered(film, text, fault)


def _caption_of_another(rng, film, style):
    """A caption that shares hardly a word with what the film shows."""
    shown = set().union(*(keyword_set(scene) for scene in film.scenes))
    while True:
        scene = draw_scene(rng, False, (1, 3), (1, 2), camera=0.0)
        if not shown & {scene.theme, *(word for thing in scene.things for word in thing.name)}:
            return describe(rng, Film((scene,)), "coarse").text


def render_video(video):
    """The file's bytes, fault included."""
    if video.fault == "static":
        return encode_mp4(np.repeat(render_frame(video.film.scenes[0], 0.5)[None], 16, axis=0))
    frames = render(video.film)
    if video.fault == "broken file":
        return encode_mp4(frames)[: 600 + len(frames)]  # the index at the end is gone
    if video.fault == "duplicate":
        return encode_mp4(frames, crf=25)  # as a second upload has the same pictures
    return encode_mp4(frames)
