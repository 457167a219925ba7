"""mini-UVRB before rendering: the films of ten corpora and the questions of the 16 datasets, each with its right
answers.

Shapes follow the originals: who shares a corpus, what a query consists of, how many queries there are to a video. A
third of the films have a neighbour that differs in one attribute only. A question enters only if the scene graphs
prove its answers: one film where the metric is recall@1, at most ten where it is recall@10.
"""

from dataclasses import dataclass, field

from dataset_builders.mini.edits import draw_family
from dataset_builders.mini.oracle import FrameQuestion, SceneQuestion, TextQuestion, relevant
from dataset_builders.mini.texts import describe, event
from dataset_builders.mini.world import Film, change, draw_scene, generator, pick


NEIGHBOURS = 0.25  # share of draws that are followed by a neighbour: two fifths of all films then have one
N_FILMS = 200
N_LONG = 210

# corpus: the datasets that search it
CORPORA = {
    "msrvtt": ("msrvtt", "msrvtt_i2v"),
    "didemo": ("didemo",),
    "crb": ("crb_g", "crb_s", "crb_t"),
    "vdc": ("vdc_o", "vdc_d"),
    "cmrb": ("cmrb",),
    "dream": ("dream_e",),
    "pev": ("pev_k",),
    "lovr": ("lovr_v", "lovr_c2v"),
    "lovr_clips": ("lovr_th",),
    "ms": ("ms_ti", "ms_tv"),
}
CORPUS_OF = {key: corpus for corpus, keys in CORPORA.items() for key in keys}
TEXT_STYLES = {
    "msrvtt": "coarse",
    "didemo": "paragraph",
    "crb_g": "general",
    "crb_s": "spatial",
    "crb_t": "temporal",
    "vdc_o": "object",
    "vdc_d": "detailed",
    "cmrb": "camera",
    "dream_e": "event",
    "pev_k": "keywords",
    "lovr_v": "long",
    "lovr_th": "theme",
}


@dataclass
class Query:
    """One row of a dataset's queries. `image` is `(film, frame index)`."""

    id: str
    question: object
    text: str | None = None
    image: tuple[Film, int] | None = None
    video: Film | None = None
    candidates: list[str] | None = None
    relevant: list[str] = field(default_factory=list)


@dataclass
class Corpus:
    films: dict[str, Film]
    neighbours: dict[str, str]  # id to the id of the film that differs in one attribute


class Drawing:
    """Fills a corpus film by film, each held against the questions that stand already."""

    def __init__(self, name, seed, keys, limit):
        self.name, self.seed, self.keys, self.limit = name, seed, keys, limit
        self.films, self.neighbours = {}, {}
        self.questions = []  # [dataset key, film id, Description, right answers so far]

    def texts(self, film, film_id):
        for key in self.keys:
            rng = generator("text", self.seed, key, film_id)
            if key == "dream_e":
                for k in range(len(film.scenes[0].events)):
                    yield key, event(rng, film.scenes[0], k=k)
            else:
                yield key, describe(rng, film, TEXT_STYLES[key])

    def add(self, film):
        """The new film's id, or None where some film would be left without a question of its own."""
        film_id = f"{self.name}-{len(self.films):04d}"
        if film in self.films.values():
            return None
        rows = [[key, film_id, said, 1] for key, said in self.texts(film, film_id)]
        rows = [[*row[:3], 1 + len(relevant(TextQuestion(row[2].facts), self.films))] for row in rows]
        also_right = [row for row in self.questions if TextQuestion(row[2].facts).is_answered_by(film)]
        spoilt = [row for row in also_right if row[3] >= self.limit]
        kept = [row for row in rows if row[3] <= self.limit]
        if "dream_e" not in self.keys and (spoilt or len(kept) < len(rows)):
            return None
        # An event that two films share is no question; each film keeps at least one event of its own.
        left = {row[1] for row in self.questions if not any(row is other for other in spoilt)}
        if not kept or left != set(self.films) or len({row[2].facts for row in rows}) < len(rows):
            return None
        for row in also_right:
            row[3] += 1
        self.questions = [row for row in self.questions if row[3] <= self.limit] + kept
        self.films[film_id] = film
        return film_id

    def fill(self, n, draw, vary):
        rng = generator("corpus", self.seed, self.name)
        while len(self.films) < n:
            film = draw(rng)
            film_id = self.add(film)
            if film_id is None or rng.random() > NEIGHBOURS or len(self.films) >= n:
                continue
            for _ in range(20):
                changed = vary(rng, film)
                other_id = changed and self.add(changed)
                if other_id:
                    self.neighbours[film_id], self.neighbours[other_id] = other_id, film_id
                    break
        return Corpus(self.films, self.neighbours)


def vary_scene(*attributes):
    def vary(rng, film):
        i = int(rng.integers(len(film.scenes)))
        scene = change(rng, film.scenes[i], pick(rng, attributes))
        if scene is None or not scene.is_test:
            return None
        return Film((*film.scenes[:i], scene, *film.scenes[i + 1 :]))

    return vary


def vary_story(rng, film):
    """Another order of the scenes, or one scene changed."""
    if rng.random() < 0.5:
        return Film(tuple(reversed(film.scenes)))
    return vary_scene("colour", "direction", "theme")(rng, film)


def one_scene(**settings):
    return lambda rng: Film((draw_scene(rng, True, **settings),))


def several_scenes(low, high, **settings):
    return lambda rng: Film(tuple(draw_scene(rng, True, **settings) for _ in range(int(rng.integers(low, high + 1)))))


# corpus: (number of films, most right answers a question, how to draw a film, how to change one attribute)
PLANS = {
    "msrvtt": (
        N_FILMS,
        1,
        one_scene(things=(1, 3), events=(1, 2), camera=0.35),
        vary_scene("colour", "direction", "order", "camera", "theme"),
    ),
    "didemo": (N_FILMS, 1, several_scenes(2, 3, things=(1, 2), events=(1, 1), camera=0.0), vary_story),
    "crb": (N_FILMS, 1, one_scene(things=(2, 3), events=(1, 2), camera=0.35), vary_scene("colour", "shape")),
    "vdc": (N_FILMS, 1, one_scene(things=(2, 3), events=(1, 2), camera=0.2), vary_scene("colour", "texture", "shape")),
    "cmrb": (
        280,
        10,
        one_scene(things=(1, 2), events=(0, 1), camera=0.9, two_moves=True),
        vary_scene("camera"),
    ),
    "dream": (N_FILMS, 1, one_scene(things=(2, 3), events=(2, 2), camera=0.0), vary_scene("colour", "direction")),
    "pev": (
        220,
        1,
        one_scene(things=(2, 3), events=(1, 2), camera=0.4),
        vary_scene("colour", "direction", "camera", "theme"),
    ),
    "lovr": (
        N_LONG,
        1,
        several_scenes(6, 10, things=(1, 2), events=(1, 2), camera=0.2),
        vary_scene("colour", "theme", "direction"),
    ),
}
N_QUERIES = {"cmrb": 200, "lovr_v": 200, "pev_k": 205}  # fewer than films, as in the originals; elsewhere all


def draw_clips(long, seed):
    """One scene of each long film as a clip of its own, such that no theme fits more than ten.

    Of two long films that differ in one scene it is that scene, so that the clips are neighbours as well.
    """
    drawing, clip_of = Drawing("lovr_clips", seed, ("lovr_th",), 10), {}
    for film_id, film in long.films.items():
        order = list(generator("clips", seed, film_id).permutation(len(film.scenes)))
        if film_id in long.neighbours:
            other = long.films[long.neighbours[film_id]]
            order.sort(key=lambda i: film.scenes[i] == other.scenes[i])
        for i in order:
            clip_of[film_id] = drawing.add(Film((film.scenes[i],)))
            if clip_of[film_id]:
                break
    pairs = ((clip_of[a], clip_of[b]) for a, b in long.neighbours.items())
    return drawing, {a: b for a, b in pairs if a and b}


def text_queries(key, drawing, seed):
    rows = [row for row in drawing.questions if row[0] == key]
    chosen = sorted(generator("queries", seed, key).permutation(len(rows))[: N_QUERIES.get(key)])
    return [
        Query(f"{key}-q{n:04d}", TextQuestion(rows[i][2].facts), text=rows[i][2].text) for n, i in enumerate(chosen)
    ]


def image_queries(key, films, seed):
    """One frame of each film, none that a neighbour shows as well."""
    queries = []
    for n, (film_id, film) in enumerate(films.items()):
        for index in generator("frame", seed, film_id).permutation(film.frames):
            question = FrameQuestion(film, int(index))
            if relevant(question, films) == [film_id]:
                queries.append(Query(f"{key}-q{n:04d}", question, image=(film, int(index))))
                break
    return queries


def clip_queries(key, films, seed):
    """One scene of each long film, none that a neighbour holds as well."""
    queries = []
    for n, (film_id, film) in enumerate(films.items()):
        for i in generator("clip", seed, film_id).permutation(len(film.scenes)):
            question = SceneQuestion(film.scenes[i])
            if relevant(question, films) == [film_id]:
                queries.append(Query(f"{key}-q{n:04d}", question, video=Film((film.scenes[i],))))
                break
    return queries


def composed_corpus(seed, n_families=20):
    """Families of ten clips and, for each clip, its reference and the text of its edit."""
    films, rows, neighbours = {}, [], {}
    for f in range(n_families):
        family = draw_family(generator("family", seed, f), test=True)
        ids = [f"ms-{f:02d}-{j}" for j in range(len(family))]
        films |= {film_id: Film((clip,)) for film_id, (_, _, clip) in zip(ids, family)}
        neighbours |= {film_id: other for film_id, other in zip(ids, ids[1:] + ids[:1])}
        rows += [(ids, reference, edit, clip) for reference, edit, clip in family]
    return Corpus(films, neighbours), rows


def composed_queries(key, rows, seed):
    queries = []
    for n, (ids, reference, edit, clip) in enumerate(rows):
        text = edit.text(generator("edit", seed, n))
        film = Film((reference,))
        media = {"image": (film, 0)} if key == "ms_ti" else {"video": film}
        queries.append(Query(f"{key}-q{n:04d}", SceneQuestion(clip), text=text, candidates=ids, **media))
    return queries


def build_benchmark(seed=0):
    """All corpora and queries.

    Args:
        seed (`int`): the same seed gives the same benchmark.

    Returns:
        `tuple[dict[str, Corpus], dict[str, list[Query]]]`: by corpus name and by dataset key.
    """
    corpora, queries = {}, {}
    for name, (n, limit, draw, vary) in PLANS.items():
        text_keys = tuple(key for key in CORPORA[name] if key in TEXT_STYLES)
        drawing = Drawing(name, seed, text_keys, limit)
        corpora[name] = drawing.fill(n, draw, vary)
        for key in text_keys:
            queries[key] = text_queries(key, drawing, seed)
    clips, neighbours = draw_clips(corpora["lovr"], seed)
    corpora["lovr_clips"] = Corpus(clips.films, neighbours)
    queries["lovr_th"] = text_queries("lovr_th", clips, seed)
    queries["msrvtt_i2v"] = image_queries("msrvtt_i2v", corpora["msrvtt"].films, seed)
    queries["lovr_c2v"] = clip_queries("lovr_c2v", corpora["lovr"].films, seed)
    corpora["ms"], rows = composed_corpus(seed)
    for key in ("ms_ti", "ms_tv"):
        queries[key] = composed_queries(key, rows, seed)
    for key, asked in queries.items():
        films = corpora[CORPUS_OF[key]].films
        for query in asked:
            pool = films if query.candidates is None else {i: films[i] for i in query.candidates}
            query.relevant = relevant(query.question, pool)
    return corpora, queries
