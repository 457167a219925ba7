"""The rendered world's training pairs before rendering: "collected" ones with noisy texts, and mini-UVRD in its seven
formats.

Formats and the presence of hard negatives follow the paper's mixture: T2V, TI2V and TV2V have one a positive. All
scenes are training's (`Scene.is_test` is false).

Not in the paper: all counts. They follow the proportions of what a demo can learn from in minutes, not those of 1.55M
pairs.
"""

from dataclasses import dataclass, field

from dataset_builders.mini.edits import draw_family
from dataset_builders.mini.oracle import TextQuestion
from dataset_builders.mini.texts import STYLES_OF_TEXT, describe
from dataset_builders.mini.world import Film, change, draw_scene, generator, pick


# How often each count below is taken; `python -m dataset_builders.mini uvrd --scale` multiplies them.
N_SHORT = 1200  # twins of single scenes, one attribute apart
N_STORIES = 300
N_LONG = 300
N_FAMILIES = 100
N_PAIRS = {
    "t2t": 1000,
    "t2i": 1000,
    "t2v": 4000,
    "ti2v": 1000,
    "tv2v": 1000,
    "i2v": 1000,
    "v2v": 900,
    "collected-t2t": 800,
    "collected-t2i": 800,
    "collected-i2t": 800,
    "collected-t2v": 2400,
}
VALIDATION_SHARE = 0.05

# The query side's instruction by what the text is about; our own words, near those that the benchmark's tasks use.
INSTRUCTIONS = {
    "coarse": "Find the clip that corresponds to the described scene in the given video.",
    "paragraph": "Find a video that includes the following described scenes.",
    "general": "Find the video according to the general text description.",
    "spatial": "Find the video according to the spatial description.",
    "object": "Find the video according to the object description.",
    "temporal": "Find the video according to the temporal description.",
    "camera": "Find the video according to the camera motion description.",
    "event": "Find the video according to the text description.",
    "theme": "Find the video according to text description about video theme information.",
    "keywords": "Find the video according to the text description of a series of keywords.",
    "long": "Find the long video according to the long text description.",
    "detailed": "Find the video according to the detailed text description.",
    "ti2v": "Find the video clip that corresponds to the given text and the given image.",
    "tv2v": "Find the video clip that corresponds to the given text and the given video.",
    "i2v": "Find the video according to the image.",
    "v2v": "Find the original long video according to the short video clip.",
    "t2t": "Find the text that describes the same video.",
    "t2i": "Find the image according to the text description.",
    "i2t": "Find the text that describes the image.",
}


@dataclass(frozen=True)
class Item:
    """One side of a pair: any of text, picture `(film, frame index)` and film."""

    text: str | None = None
    image: tuple[Film, int] | None = None
    video: Film | None = None


@dataclass(frozen=True)
class Pair:
    query: Item
    target: Item
    instruction: str
    task: str
    source_id: str
    negatives: tuple[Item, ...] = field(default=())


@dataclass(frozen=True)
class Source:
    """A film of training, and, where it has one, its twin that differs in one attribute."""

    id: str
    film: Film
    twin: Film | None = None


def draw_sources(seed, scale):
    """`(shorts, stories, longs)`, three lists of `Source`."""
    shorts, stories, longs = [], [], []
    for i in range(round(N_SHORT * scale)):
        rng = generator("short", seed, i)
        scene = draw_scene(rng, False, things=(1, 3), events=(1, 2), camera=0.45, two_moves=rng.random() < 0.3)
        twin = None
        while twin is None:
            attribute = pick(rng, ("colour", "shape", "texture", "direction", "direction", "order", "camera", "theme"))
            twin = change(rng, scene, attribute)
            twin = None if twin is None or twin.is_test else twin
        shorts.append(Source(f"short-{i:05d}", Film((scene,)), Film((twin,))))
    for i in range(round(N_STORIES * scale)):
        rng = generator("story", seed, i)
        scenes = tuple(draw_scene(rng, False, (1, 2), (1, 1), camera=0.0) for _ in range(int(rng.integers(2, 4))))
        stories.append(Source(f"story-{i:05d}", Film(scenes), Film(scenes[::-1])))
    for i in range(round(N_LONG * scale)):
        rng = generator("long", seed, i)
        n = int(rng.integers(6, 11))
        longs.append(
            Source(f"long-{i:05d}", Film(tuple(draw_scene(rng, False, (1, 2), (1, 2), 0.2) for _ in range(n))))
        )
    return shorts, stories, longs


def text_of(rng, film, style, twin=None):
    """A text in the style and whether it tells the film from its twin."""
    said = describe(rng, film, style)
    return said.text, twin is not None and not TextQuestion(said.facts).is_answered_by(twin)


def noisy(rng, text, others):
    """What the web makes of a caption: cut short, wrapped in boilerplate, or (one in ten) that of another clip."""
    chance = rng.random()
    if chance < 0.1:
        return pick(rng, others)
    if chance < 0.25:
        words = text.split()
        return " ".join(words[: max(3, len(words) // 2)])
    if chance < 0.4:
        return pick(rng, ("Watch this: {} !!", "{} (official clip)", "new video {} subscribe")).format(text)
    return text


def t2v(seed, n, shorts, stories, longs):
    """Every style of text to its video; the twin is the hard negative where the text excludes it."""
    styles = tuple(STYLES_OF_TEXT)
    for i in range(n):
        rng = generator("t2v", seed, i)
        chance = rng.random()
        pool, style = (shorts, None) if chance < 0.8 else (stories, "paragraph") if chance < 0.9 else (longs, "long")
        source = pick(rng, pool)
        style = style or pick(rng, styles)
        film, twin = source.film, source.twin
        if twin is not None and rng.random() < 0.5:
            film, twin = twin, film
        text, excludes = text_of(rng, film, style, twin)
        negatives = (Item(video=twin),) if excludes else ()
        yield Pair(Item(text=text), Item(video=film), INSTRUCTIONS[style], "t2v", source.id, negatives)


def t2t(seed, n, shorts):
    """Two texts of one video, the shorter one asks."""
    nested = (
        ("coarse", "detailed"),
        ("event", "temporal"),
        ("object", "spatial"),
        ("spatial", "detailed"),
        ("coarse", "general"),
    )
    for i in range(n):
        rng = generator("t2t", seed, i)
        source = pick(rng, shorts)
        asked, found = (describe(rng, source.film, style).text for style in pick(rng, nested))
        yield Pair(Item(text=asked), Item(text=found), INSTRUCTIONS["t2t"], "t2t", source.id)


def t2i(seed, n, shorts):
    """What the first frame shows, and that frame."""
    for i in range(n):
        rng = generator("t2i", seed, i)
        source = pick(rng, shorts)
        text = describe(rng, source.film, pick(rng, ("spatial", "object"))).text
        yield Pair(Item(text=text), Item(image=(source.film, 0)), INSTRUCTIONS["t2i"], "t2i", source.id)


def i2v(seed, n, shorts):
    for i in range(n):
        rng = generator("i2v", seed, i)
        source = pick(rng, shorts)
        film = pick(rng, (source.film, source.twin))
        frame = (film, int(rng.integers(film.frames)))
        yield Pair(Item(image=frame), Item(video=film), INSTRUCTIONS["i2v"], "i2v", source.id)


def v2v(seed, n, stories, longs):
    """A clip and the longer video that it was cut from."""
    for i in range(n):
        rng = generator("v2v", seed, i)
        source = pick(rng, longs if rng.random() < 0.8 else stories)
        clip = Film((pick(rng, source.film.scenes),))
        yield Pair(Item(video=clip), Item(video=source.film), INSTRUCTIONS["v2v"], "v2v", source.id)


def composed(task, seed, n, n_families):
    """Reference and edit to the edited clip; another clip with the same reference or edit is the hard negative."""
    families = [draw_family(generator("edits", seed, f), test=False) for f in range(n_families)]
    for i in range(n):
        rng = generator(task, seed, i)
        f = int(rng.integers(n_families))
        cell = int(rng.integers(len(families[f])))
        reference, edit, clip = families[f][cell]
        film = Film((reference,))
        media = {"image": (film, 0)} if task == "ti2v" else {"video": film}
        near = [
            other[2]
            for j, other in enumerate(families[f])
            if j != cell and (other[0] == reference or other[1] == edit)
        ]
        sides = Item(text=edit.text(rng), **media), Item(video=Film((clip,)))
        negative = Item(video=Film((pick(rng, near),)))
        yield Pair(*sides, INSTRUCTIONS[task], task, f"family-{f:04d}", (negative,))


def collected(task, seed, n, shorts):
    """Weakly labelled pairs: coarse captions with a web's noise."""
    others = [
        describe(generator("other", seed, i), shorts[i].film, "coarse").text for i in range(min(200, len(shorts)))
    ]
    for i in range(n):
        rng = generator(task, seed, i)
        source = pick(rng, shorts)
        style = "coarse" if task.endswith("v") else pick(rng, ("object", "spatial", "coarse"))
        text = noisy(rng, describe(rng, source.film, style).text, others)
        picture = Item(image=(source.film, 0))
        if task == "collected-t2v":
            sides = Item(text=text), Item(video=source.film), INSTRUCTIONS["coarse"]
        elif task == "collected-t2i":
            sides = Item(text=text), picture, INSTRUCTIONS["t2i"]
        elif task == "collected-i2t":
            sides = picture, Item(text=text), INSTRUCTIONS["i2t"]
        else:
            clean = describe(rng, source.film, "general").text
            sides = Item(text=text), Item(text=clean), INSTRUCTIONS["t2t"]
        yield Pair(*sides, task, source.id)


def build_pairs(task, seed=0, scale=1.0):
    """All pairs of one task in a fixed order.

    Args:
        task (`str`): a key of `N_PAIRS`.
        seed (`int`): the same seed gives the same pairs.
        scale (`float`): factor on the numbers of pairs and films.

    Returns:
        `list[Pair]`

    Raises:
        ValueError: unknown task.
    """
    if task not in N_PAIRS:
        raise ValueError(f"Unknown task {task!r}; choose from {list(N_PAIRS)}.")
    shorts, stories, longs = draw_sources(seed, scale)
    n = round(N_PAIRS[task] * scale)
    if task == "t2v":
        return list(t2v(seed, n, shorts, stories, longs))
    if task == "v2v":
        return list(v2v(seed, n, stories, longs))
    if task in ("ti2v", "tv2v"):
        return list(composed(task, seed, n, round(N_FAMILIES * scale)))
    if task in ("t2t", "t2i", "i2v"):
        return list({"t2t": t2t, "t2i": t2i, "i2v": i2v}[task](seed, n, shorts))
    return list(collected(task, seed, n, shorts))


def is_validation(pair, seed=0):
    """Split by source, so that no film is on both sides."""
    return generator("split", seed, pair.source_id).random() < VALIDATION_SHARE
