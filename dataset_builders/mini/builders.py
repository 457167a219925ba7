"""`datasets` builders of the rendered world: mini-UVRB and the mini training pairs, as Parquet with the videos inside.

One configuration is one table of the Hub repo. Rendering runs on all cores; the rows' order, and so the bytes, do not
depend on them.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import datasets

from dataset_builders.hub_layout import SIDE, TABLES, default_row
from dataset_builders.mini.benchmark import CORPUS_OF, build_benchmark
from dataset_builders.mini.pairs import N_PAIRS, Item, build_pairs, is_validation
from dataset_builders.mini.render import encode_png, frame_times, processes, render_frame, render_mp4
from dataset_builders.uvrb.tasks import TASKS


PAIR = datasets.Features(
    {
        **{f"query_{name}": kind for name, kind in SIDE.items()},
        **{f"target_{name}": kind for name, kind in SIDE.items()},
        "negatives": datasets.List(SIDE),
        "instruction": datasets.Value("string"),
        "task": datasets.Value("string"),
        "source_id": datasets.Value("string"),
    }
)


def picture(frame_of):
    """A frame `(film, index)` as PNG."""
    film, index = frame_of
    return {"bytes": encode_png(render_frame(*frame_times(film)[index])), "path": None}


def movie(film):
    return {"bytes": render_mp4(film), "path": None}


def rendered(jobs):
    """`function(argument)` of each job, in order, on all cores."""
    with ProcessPoolExecutor(processes()) as pool:
        yield from pool.map(_run, jobs, chunksize=8)


def _run(job):
    function, argument = job
    return function(argument)


_FILES = {}  # rendered media: the tables of one repo share most of theirs


def media_of(items):
    """Text, picture and movie of each item (anything with `.text`, `.image`, `.video`), each rendered once."""
    jobs = [(picture, item.image) for item in items if item.image] + [
        (movie, item.video) for item in items if item.video
    ]
    jobs = [job for job in dict.fromkeys(jobs) if job not in _FILES]
    _FILES.update(zip(jobs, rendered(jobs)))
    return [
        {"text": item.text, "image": _FILES.get((picture, item.image)), "video": _FILES.get((movie, item.video))}
        for item in items
    ]


@dataclass
class MiniUVRBConfig(datasets.BuilderConfig):
    """`name` is a table: "default" or `<key>-corpus`, `<key>-queries`, `<key>-qrels`, `<key>-top_ranked`."""

    seed: int = 0

    @property
    def table(self):
        return self.name.rpartition("-")[2]

    @property
    def key(self):
        return self.name.rpartition("-")[0]


def benchmark_tables():
    """Names of all tables in the order of the repo's card."""
    return ["default", *(config for task in TASKS.values() for config in task.configs)]


_BENCHMARKS = {}  # by seed: the graphs take seconds to draw, and each table needs them


def benchmark(seed):
    if seed not in _BENCHMARKS:
        _BENCHMARKS[seed] = build_benchmark(seed)
    return _BENCHMARKS[seed]


class MiniUVRB(datasets.GeneratorBasedBuilder):
    """The 16 datasets of mini-UVRB (arXiv 2510.27571, section 3, in miniature)."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = MiniUVRBConfig
    BUILDER_CONFIGS = [MiniUVRBConfig(name=name) for name in benchmark_tables()]
    DEFAULT_CONFIG_NAME = "default"

    def _info(self):
        return datasets.DatasetInfo(features=TABLES[self.config.table])

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("test")]

    def _generate_examples(self):
        corpora, queries = benchmark(self.config.seed)
        key, table = self.config.key, self.config.table
        if table == "corpus":
            films = corpora[CORPUS_OF[key]].films
            for film_id, media in zip(films, media_of([Item(video=film) for film in films.values()])):
                yield film_id, {"id": film_id, **media}
        elif table == "queries":
            for query, media in zip(queries[key], media_of(queries[key])):
                yield query.id, {"id": query.id, **media}
        elif table == "qrels":
            for query in queries[key]:
                for film_id in query.relevant:
                    yield f"{query.id} {film_id}", {"query-id": query.id, "corpus-id": film_id, "score": 1}
        elif table == "top_ranked":
            for query in queries[key]:
                yield query.id, {"query-id": query.id, "corpus-ids": query.candidates}
        else:
            yield from self._all_queries(queries)

    def _all_queries(self, queries):
        for key, task in TASKS.items():
            for query, media in zip(queries[key], media_of(queries[key])):
                row = {"id": query.id, **media}
                yield query.id, default_row(task, row, query.relevant, query.candidates)


@dataclass
class MiniPairsConfig(datasets.BuilderConfig):
    """`name` is a task of `dataset_builders.mini.pairs.N_PAIRS`."""

    seed: int = 0
    scale: float = 1.0


class MiniPairs(datasets.GeneratorBasedBuilder):
    """Collected pairs and mini-UVRD (arXiv 2510.27571, section 4, in miniature)."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = MiniPairsConfig
    BUILDER_CONFIGS = [MiniPairsConfig(name=name) for name in N_PAIRS]

    def _info(self):
        return datasets.DatasetInfo(features=PAIR)

    def _split_generators(self, dl_manager):
        pairs = build_pairs(self.config.name, self.config.seed, self.config.scale)
        held_out = [is_validation(pair, self.config.seed) for pair in pairs]
        return [
            datasets.SplitGenerator(
                "train", gen_kwargs={"pairs": [p for p, held in zip(pairs, held_out) if not held]}
            ),
            datasets.SplitGenerator(
                "validation", gen_kwargs={"pairs": [p for p, held in zip(pairs, held_out) if held]}
            ),
        ]

    def _generate_examples(self, pairs):
        items = [item for pair in pairs for item in (pair.query, pair.target, *pair.negatives)]
        media = iter(media_of(items))
        for i, pair in enumerate(pairs):
            query, target = next(media), next(media)
            yield (
                i,
                {
                    **{f"query_{name}": value for name, value in query.items()},
                    **{f"target_{name}": value for name, value in target.items()},
                    "negatives": [next(media) for _ in pair.negatives],
                    "instruction": pair.instruction,
                    "task": pair.task,
                    "source_id": pair.source_id,
                },
            )
