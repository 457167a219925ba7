"""Questions whose right answers follow from the scene graphs, and so the proof that the benchmark is honest."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dataset_builders.mini.render import camera_at, frame_times, things_at
from dataset_builders.mini.texts import facts_of, holds
from dataset_builders.mini.world import Film, Scene


@lru_cache(maxsize=20000)
def cached_facts(film):
    return facts_of(film)


@dataclass(frozen=True)
class TextQuestion:
    """Right is each film that bears the facts out."""

    facts: frozenset

    def is_answered_by(self, film: Film):
        return holds(self.facts, cached_facts(film))


@lru_cache(maxsize=200000)
def frame_state(scene: Scene, time: float):
    """All numbers that a picture of the scene depends on: positions in pixels, and 20 times zoom, size and angle."""
    dx, dy, zoom, roll = camera_at(scene, time)
    places = [value for x, y, scale, angle in things_at(scene, time) for value in (x, y, 20 * scale, 20 * angle)]
    return np.array([dx, dy, 20 * zoom, 20 * roll, *places])


@dataclass(frozen=True)
class FrameQuestion:
    """Right is each film in which this frame, or one that can not be told from it, occurs."""

    film: Film
    index: int
    tolerance = 3.0

    def is_answered_by(self, film: Film):
        scene, time = frame_times(self.film)[self.index]
        state = frame_state(scene, time)
        looks = (scene.theme, scene.style, scene.seed)
        for other, moment in frame_times(film):
            same = (other.theme, other.style, other.seed) == looks and len(other.things) == len(scene.things)
            if same and [look(t) for t in other.things] == [look(t) for t in scene.things]:
                if np.abs(frame_state(other, moment) - state).max() < self.tolerance:
                    return True
        return False


def look(thing):
    return thing.colour, thing.shape, thing.size, thing.texture, thing.count


@dataclass(frozen=True)
class SceneQuestion:
    """Right is each film that holds this very scene: its clip, or what an edit of a reference leads to."""

    scene: Scene

    def is_answered_by(self, film: Film):
        return self.scene in film.scenes


def relevant(question, films):
    """The ids of all right answers among `films`, a dict of id to `Film`."""
    return [key for key, film in films.items() if question.is_answered_by(film)]
