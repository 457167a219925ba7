"""Every text of the rendered world, derived from the scene graph together with the facts that it states.

A fact is a tuple `(kind, scene index or None, *attributes)`; None stands for "any". `facts_of` lists all facts of a
film in full, and `holds` tells whether a film bears a statement out: that is how the benchmark proves that a question
has one right answer.
"""

from collections import defaultdict
from dataclasses import dataclass

from dataset_builders.mini.world import COLUMNS, ROWS, Film, Scene, pick


@dataclass(frozen=True)
class Description:
    text: str
    facts: frozenset


THEME_PHRASES = {
    "night": ("at night", "under a night sky"),
    "ocean": ("in the ocean", "under the sea"),
    "forest": ("in the forest", "in the woods"),
    "desert": ("in the desert", "on desert sand"),
    "snow": ("in the snow", "on a snowy field"),
    "sunset": ("at sunset", "under a sunset sky"),
    "meadow": ("in the meadow", "on a flower meadow"),
    "city": ("in the city", "among city blocks"),
}
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
# action: (of one thing, of several)
VERBS = {
    "left": ("moves left", "move left"),
    "right": ("moves right", "move right"),
    "up": ("moves up", "move up"),
    "down": ("moves down", "move down"),
    "grow": ("grows", "grow"),
    "shrink": ("shrinks", "shrink"),
    "clockwise": ("turns clockwise", "turn clockwise"),
    "counterclockwise": ("turns counterclockwise", "turn counterclockwise"),
    "hit": ("hits", "hit"),
}
SYNONYMS = {
    "moves": ("moves", "slides"),
    "move": ("move", "slide"),
    "turns": ("turns", "spins"),
    "turn": ("turn", "spin"),
}
PLURALS = {"cross": "crosses", "circle": "circles"}
CAMERA_PHRASES = {
    "static": "stays still",
    "pan left": "pans left",
    "pan right": "pans right",
    "tilt up": "tilts up",
    "tilt down": "tilts down",
    "zoom in": "zooms in",
    "zoom out": "zooms out",
    "roll clockwise": "rolls clockwise",
    "roll counterclockwise": "rolls counterclockwise",
}


def plural(shape):
    return PLURALS.get(shape, shape + "s")


def place_of(thing):
    row, column = ROWS[thing.row], COLUMNS[thing.column]
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def noun(thing, *attributes):
    """Such as "two small striped red stars": size and texture only if named in `attributes`."""
    words = [COUNT_WORDS[thing.count]]
    words += [getattr(thing, name) for name in ("size", "texture") if name in attributes]
    words += [thing.colour, thing.shape if thing.count == 1 else plural(thing.shape)]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def short_noun(thing):
    return f"{thing.colour} {thing.shape if thing.count == 1 else plural(thing.shape)}"


def clause(rng, scene, event, article="the", after=None):
    """Such as "the red star slides left", without its place in the order.

    The actor of the event before (`after`) is not named again.
    """
    actor = scene.things[event.actor]
    first, _, rest = VERBS[event.action][actor.count > 1].partition(" ")
    words = [pick(rng, SYNONYMS.get(first, (first,))), rest]
    if after is None or after.actor != event.actor:
        words.insert(0, f"the {short_noun(actor)}" if article == "the" else noun(actor))
    if event.target is not None:
        words.append(f"the {short_noun(scene.things[event.target])}")
    return " ".join(filter(None, words))


def event_fact(index, scene, event, order=None):
    target = None if event.target is None else scene.things[event.target].name
    return ("event", index, *scene.things[event.actor].name, event.action, target, order)


def thing_fact(index, thing, *attributes):
    """Colour and shape always, the others (count, size, texture, place) only if named in `attributes`."""
    said = [getattr(thing, name) if name in attributes else None for name in ("count", "size", "texture")]
    return ("thing", index, *thing.name, *said, (thing.column, thing.row) if "place" in attributes else None)


def _order(scene, k):
    return None if len(scene.events) < 2 else ("first", "second")[k]


def _events_text(rng, scene, index, article="the"):
    pairs = zip(scene.events, (None, *scene.events))
    parts = [clause(rng, scene, event, article, before) for event, before in pairs]
    facts = {event_fact(index, scene, event, _order(scene, k)) for k, event in enumerate(scene.events)}
    if not parts:
        return "nothing moves", {("still", index)}
    return ", then ".join(parts), facts


def _camera_text(scene, index):
    first, second = scene.camera
    facts = {("camera", index, 0, first), ("camera", index, 1, second)}
    if first == second:
        return f"the camera {CAMERA_PHRASES[first]}", facts
    return f"the camera {CAMERA_PHRASES[first]}, then {CAMERA_PHRASES[second]}", facts


def _sentence(text):
    return text[0].upper() + text[1:] + "."


def coarse(rng, scene, index=None):
    """As short as a clip's title: who does what, in which surroundings, and the camera if it moves."""
    text, facts = _events_text(rng, scene, index, article="a")
    text += " " + pick(rng, THEME_PHRASES[scene.theme])
    facts = facts | {("theme", index, scene.theme)}
    if scene.camera != ("static", "static"):
        camera, more = _camera_text(scene, index)
        text, facts = f"{text} while {camera}", facts | more
    facts |= {thing_fact(index, scene.things[event.actor], "count") for event in scene.events}
    return Description(text, frozenset(facts))


def general(rng, scene, index=None):
    """Something of everything."""
    facts = {thing_fact(index, thing, "count", "size") for thing in scene.things}
    events, more = _events_text(rng, scene, index)
    camera, yet_more = _camera_text(scene, index)
    things = " and ".join(noun(thing, "size") for thing in scene.things)
    where = f"A {scene.style} scene {pick(rng, THEME_PHRASES[scene.theme])}"
    text = f"{where} with {things}. {_sentence(events)} {_sentence(camera)}"
    return Description(
        text, frozenset(facts | more | yet_more | {("theme", index, scene.theme), ("style", index, scene.style)})
    )


def spatial(rng, scene, index=None):
    """What stands where at the beginning."""
    facts = {thing_fact(index, thing, "count", "size", "texture", "place") for thing in scene.things}
    parts = [f"{noun(thing, 'size', 'texture')} at the {place_of(thing)}" for thing in scene.things]
    text = _sentence(f"{pick(rng, THEME_PHRASES[scene.theme])}, " + ", ".join(parts))
    return Description(text, frozenset(facts | {("theme", index, scene.theme)}))


def objects(rng, scene, index=None):
    """The looks of each thing, not its place."""
    facts = {thing_fact(index, thing, "count", "size", "texture") for thing in scene.things}
    lead = pick(rng, ("The video shows", "There is"))
    return Description(f"{lead} {' and '.join(noun(t, 'size', 'texture') for t in scene.things)}.", frozenset(facts))


def temporal(rng, scene, index=None):
    """What happens in which order, the camera included."""
    events, facts = _events_text(rng, scene, index)
    camera, more = _camera_text(scene, index)
    return Description(f"{_sentence(events)} {_sentence(camera)}", frozenset(facts | more))


def camera(rng, scene, index=None):
    """The camera's motion and what it looks at."""
    text, facts = _camera_text(scene, index)
    thing = pick(rng, scene.things)
    return Description(
        f"{_sentence(text)} It shows {noun(thing)}.", frozenset(facts | {thing_fact(index, thing, "count")})
    )


def event(rng, scene, index=None, k=None):
    """One event alone."""
    if not scene.events:
        raise ValueError("A scene without events has no event text; draw scenes with events=(1, 2).")
    chosen = scene.events[int(rng.integers(len(scene.events))) if k is None else k]
    actor = scene.things[chosen.actor]
    facts = {event_fact(index, scene, chosen), thing_fact(index, actor, "count")}
    return Description(clause(rng, scene, chosen, article="a"), frozenset(facts))


def theme(rng, scene, index=None):
    """The mood, without naming any thing."""
    facts = {
        ("theme", index, scene.theme),
        ("style", index, scene.style),
        ("mood", index, scene.mood),
        ("palette", index, scene.palette),
    }
    text = f"A {scene.mood} and {scene.style} {scene.theme} mood in {scene.palette} colors"
    return Description(text, frozenset(facts))


def keyword_set(scene):
    words = {scene.theme, scene.style}
    for thing in scene.things:
        words |= {thing.colour, thing.shape}
    for done in scene.events:
        words.add(VERBS[done.action][0])
    words |= {CAMERA_PHRASES[move].replace("stays still", "still camera") for move in scene.camera}
    return words


def keywords(rng, scene, index=None):
    """Unbound words in any order."""
    words = sorted(keyword_set(scene))
    facts = {("word", index, word) for word in words}
    return Description(", ".join(words[i] for i in rng.permutation(len(words))), frozenset(facts))


def detailed(rng, scene, index=None):
    """All that the graph holds."""
    parts = [spatial(rng, scene, index), temporal(rng, scene, index)]
    text = f"{parts[0].text} {parts[1].text} The style is {scene.style}."
    return Description(text, parts[0].facts | parts[1].facts | {("style", index, scene.style)})


STYLES_OF_TEXT = {
    "coarse": coarse,
    "general": general,
    "spatial": spatial,
    "object": objects,
    "temporal": temporal,
    "camera": camera,
    "event": event,
    "theme": theme,
    "keywords": keywords,
    "detailed": detailed,
}


def describe(rng, film: Film, style):
    """The film in one style: one scene by the functions above, several one after the other.

    Args:
        rng (`np.random.Generator`): chooses among phrasings.
        film (`Film`): one scene, or several for "paragraph" and "long".
        style (`str`): a key of `STYLES_OF_TEXT`, "paragraph" (a sentence a scene) or "long" (some sentences a scene).

    Returns:
        `Description`: the text and the facts that it states.
    """
    if style in STYLES_OF_TEXT:
        return STYLES_OF_TEXT[style](rng, film.scenes[0])
    parts, facts = [], set()
    for index, scene in enumerate(film.scenes):
        if style == "paragraph":
            said = coarse(rng, scene, index)
            parts.append(_sentence(said.text if index == 0 else f"then {said.text}"))
        elif style == "long":
            said = _chapter(rng, scene, index)
            parts.append(said.text)
        else:
            raise ValueError(f"Unknown style of text {style!r}; choose from {[*STYLES_OF_TEXT, 'paragraph', 'long']}.")
        facts |= said.facts
    return Description(" ".join(parts), frozenset(facts))


def _chapter(rng, scene: Scene, index):
    """A scene within the text of a long film."""
    shown, done = objects(rng, scene, index), _events_text(rng, scene, index)
    start = _sentence(
        f"{pick(rng, THEME_PHRASES[scene.theme])}, {' and '.join(noun(t, 'size', 'texture') for t in scene.things)}"
    )
    return Description(f"{start} {_sentence(done[0])}", shown.facts | done[1] | {("theme", index, scene.theme)})


def facts_of(film: Film):
    """All facts of the film, with no attribute left open, by `(kind, scene)` and by `(kind, None)` for any scene."""
    facts = set()
    for index, scene in enumerate(film.scenes):
        facts |= {thing_fact(index, thing, "count", "size", "texture", "place") for thing in scene.things}
        facts |= {event_fact(index, scene, done, _order(scene, k)) for k, done in enumerate(scene.events)}
        facts |= {("camera", index, half, move) for half, move in enumerate(scene.camera)}
        facts |= {("word", index, word) for word in keyword_set(scene)}
        facts |= {(kind, index, getattr(scene, kind)) for kind in ("theme", "style", "mood", "palette")}
        if not scene.events:
            facts.add(("still", index))
    sheet = defaultdict(list)
    for kind, index, *attributes in facts:
        sheet[kind, index].append(attributes)
        sheet[kind, None].append(attributes)
    return sheet


def holds(statement, sheet):
    """Whether each fact of the statement agrees with one of the film's (`facts_of`) wherever it is not open.

    An event's facts name its actor by colour and shape, which are unique in a scene, so things and events bind
    rightly.
    """
    return all(
        any(all(a is None or a == b for a, b in zip(said, full)) for full in sheet.get((kind, index), ()))
        for kind, index, *said in statement
    )
