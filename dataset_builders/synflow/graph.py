"""Reading scene graphs instead of pixels: an embedder and a captioner whose answers are true by construction.

They stand in for GME-7B and Keye-VL-8B where neither can run: in tests, and at full size in-process. Answers depend on
what is asked, the film and the profile alone, so they are the same in every process.
"""

import json
import re

import numpy as np

from dataset_builders.mini.edits import DOING, FILMING
from dataset_builders.mini.texts import (
    CAMERA_PHRASES,
    COUNT_WORDS,
    SYNONYMS,
    THEME_PHRASES,
    VERBS,
    camera,
    clause,
    general,
    keyword_set,
    noun,
    objects,
    place_of,
    plural,
    short_noun,
    spatial,
    temporal,
    theme,
)
from dataset_builders.mini.world import ACTIONS, CAMERAS, COLOURS, SHAPES, THEMES, generator, pick
from dataset_builders.synflow.texts import count_words


VOCABULARY = (*COLOURS, *SHAPES, *THEMES, *ACTIONS, *CAMERAS[1:])
_FORMS = {
    **{shape: (shape, plural(shape)) for shape in SHAPES},
    **{name: phrases for name, phrases in THEME_PHRASES.items()},
    **{move: (CAMERA_PHRASES[move],) for move in CAMERAS[1:]},
}


def _spoken(action):
    forms = []
    for phrase in VERBS[action]:
        first, _, rest = phrase.partition(" ")
        forms += [" ".join(filter(None, (verb, rest))) for verb in SYNONYMS.get(first, (first,))]
    return tuple(forms)


_FORMS.update({action: _spoken(action) for action in ACTIONS})
_PATTERNS = {
    word: re.compile(rf"\b(?:{'|'.join(map(re.escape, _FORMS.get(word, (word,))))})\b", re.I) for word in VOCABULARY
}


class GraphEmbedder:
    """Texts by the words of the rendered world that they use, films by the words that are true of them.

    The cosine is low where a text speaks of what is not there: absent words weigh as much as shared ones.
    """

    def texts(self, texts):
        return _unit([[bool(_PATTERNS[word].search(text)) for word in VOCABULARY] for text in texts])

    def films(self, films, texts):
        """Each film as seen by a reader of its text: what the text leaves out does not count against it."""
        rows = []
        for film, text in zip(films, texts):
            true = _true_words(film)
            said = [bool(_PATTERNS[word].search(text)) for word in VOCABULARY]
            rows.append([(word in true) * (1.0 if spoken else 0.2) for word, spoken in zip(VOCABULARY, said)])
        return _unit(rows)


def _true_words(film):
    words = set()
    for scene in film.scenes:
        words |= {scene.theme, *scene.camera, *(event.action for event in scene.events)}
        words |= {word for thing in scene.things for word in thing.name}
    return words


def borne_out(text, film):
    """How many of the words of the rendered world that a text uses are true of the film, and how many it uses."""
    true = _true_words(film)
    said = [word for word in VOCABULARY if _PATTERNS[word].search(text)]
    return sum(word in true for word in said), len(said)


def _unit(rows):
    vectors = np.array(rows, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _sentence(text):
    return text[0].upper() + text[1:].rstrip(".") + "."


def _statements(rng, film):
    """Ever more true sentences about a film, the most telling first; they never end."""
    while True:
        for index, scene in enumerate(film.scenes):
            lead = "" if len(film.scenes) == 1 else ("In the first shot, ", "In the second shot, ")[index % 2]
            yield _sentence(lead + general(rng, scene).text)
            yield spatial(rng, scene).text
            yield temporal(rng, scene).text
            for thing in scene.things:
                yield _sentence(
                    f"at the beginning {noun(thing, 'size', 'texture')} can be seen at the {place_of(thing)}"
                )
            for event in scene.events:
                yield _sentence(f"{lead}{clause(rng, scene, event)} as time goes on")
            yield _sentence(theme(rng, scene).text + " fills the picture")
            yield objects(rng, scene).text
            yield camera(rng, scene).text


def _long(rng, film, least, most):
    text = ""
    for sentence in _statements(rng, film):
        longer = f"{text} {sentence}".strip()
        if count_words(longer) > most:
            return text
        text = longer
        if count_words(text) >= least:
            return text
    return text


def _short(rng, film, least, most):
    """Who does what where, filled up with the camera, cut at the limit."""
    scene = film.scenes[0]
    words = f"{_events(rng, film)} {pick(rng, THEME_PHRASES[scene.theme])}, seen by a camera that"
    words += f" {CAMERA_PHRASES[scene.camera[0]]} in {pick(rng, ('a', 'one'))} {scene.style} {scene.mood} scene"
    words = words.split()
    while len(words) < least:
        words += f"with {scene.palette} colors".split()
    return " ".join(words[:most])


def _events(rng, film):
    scene = film.scenes[0]
    if scene.events:
        return clause(rng, scene, scene.events[0], article="a")
    return noun(scene.things[0])


def _keywords(rng, film, least, most):
    words = sorted(set().union(*(keyword_set(scene) for scene in film.scenes)))
    text = ", ".join(words[i] for i in rng.permutation(len(words)))
    while count_words(text) < least:
        text += ", simple shapes"
    return " ".join(text.split()[:most]).rstrip(",")


def captions(film, profile, moment=None, turn=0):
    """Five captions of a film, or of its frame at `moment` (0 to 1), by the numbers "1" to "5"; others in each turn.

    The styles' word ranges are those of `answers.VIDEO_STYLES` and `answers.FRAME_STYLES`; the second is
    always longer than 100 words and the first shorter than 20.
    """
    rng = generator("graph captions", repr(film.scenes), profile, moment is not None, *([turn] if turn else []))
    still = moment is not None
    if still:
        scene = film.scenes[min(int(moment * len(film.scenes)), len(film.scenes) - 1)]
        parts = [noun(thing, "texture") for thing in scene.things]
        where = pick(rng, THEME_PHRASES[scene.theme])
        first = f"{' and '.join(parts)} {where} in a {scene.style} picture with {scene.palette} colors"
        summary = " ".join(first.split()[:18])
        rich = _still_text(rng, scene, 105, 190)
        shown = noun(scene.things[0])
        partial = f"a {scene.style} still picture {where} that shows {shown} among other details"
        abstract = _still_text(rng, scene, 32, 95)
        keywords = ", ".join(
            sorted({scene.theme, scene.style, *(w for t in scene.things for w in t.name), "still", "picture"})
        )
    else:
        summary = _short(rng, film, 10, 18)
        rich = _long(rng, film, 105, 195)
        abstract = _long(rng, film, 32, 98)
        keywords = _keywords(rng, film, 5, 30)
        partial = _short(rng, film, 10, 14) if profile != "temporal" else _short(rng, film, 12, 16)
    return {"1": summary, "2": rich, "3": abstract, "4": keywords, "5": partial}


def _still_text(rng, scene, least, most):
    sentences = [
        f"The picture lies {pick(rng, THEME_PHRASES[scene.theme])} and its look is {scene.style}",
        f"Its colors are {scene.palette} and its mood is {scene.mood}",
    ]
    for thing in scene.things:
        sentences.append(f"{noun(thing, 'size', 'texture')} can be made out clearly before the background")
        sentences.append(f"The surface of the {short_noun(thing)} is {thing.texture} and the color is {thing.colour}")
        sentences.append(f"There {'is' if thing.count == 1 else 'are'} {COUNT_WORDS[thing.count]} of this kind")
    text, k = "", 0
    while count_words(text) < least:
        longer = f"{text} {_sentence(sentences[k % len(sentences)])}".strip()
        if count_words(longer) > most:
            break
        text, k = longer, k + 1
    return text


def composed_query(reference, target, clip):
    """A text that leads from the reference film to the target film, naming what changes and nothing that stays."""
    rng = generator("graph query", repr(reference.scenes), repr(target.scenes), clip)
    before, after = reference.scenes[0], target.scenes[0]
    same = [thing.name for thing in before.things] == [thing.name for thing in after.things]
    lead = "the same shapes" if same else "a like scene with other shapes"
    changes = []
    if before.theme != after.theme:
        changes.append(pick(rng, THEME_PHRASES[after.theme]))
    if before.events != after.events and after.events and after.events[0].action in DOING:
        changes.append(DOING[after.events[0].action])
    if before.camera != after.camera:
        move = after.camera[0]
        kind, _, way = move.partition(" ")
        changes.append("with a still camera" if move == "static" else f"with the camera {FILMING[kind]} {way}")
    changes = changes or ["a moment later"]
    query = f"{lead}, but now {' and '.join(changes[: 1 if clip else 2])}"
    return " ".join(query.split()[: 15 if clip else 50])


def answer(task, reference, target=None, profile="other", moment=None, turn=0):
    """The JSON text that answers a task of `prompts.TASKS`."""
    if task == "video_captions":
        return json.dumps(captions(reference, profile, turn=turn))
    if task == "frame_captions":
        return json.dumps(captions(reference, profile, moment))
    return json.dumps({"query": composed_query(reference, target, clip=task == "clip_query")})
