"""The 16 datasets of UVRB, one `Task` each: what they ask, with which instruction and metric, at which published size.

Every part of the project that needs such a fact (builders, runner, cards) takes it from here; the table itself is
`datasets.csv` beside this file.
"""

import csv
from dataclasses import dataclass
from pathlib import Path


METRICS = ("recall", "precision")
MODALITIES = ("text", "text+image", "text+video", "image", "video")


@dataclass(frozen=True)
class Task:
    """One dataset of UVRB (arXiv 2510.27571, section 3 and its appendix).

    Args:
        key (`str`): prefix of the dataset's configs (`<key>-corpus` and so on) and name of its score.
        name (`str`): as the paper prints it.
        task (`str`): kind of query: `TXT`, `CMP` (text with an image or a video) or `VIS`.
        domain (`str`): `CG`, `FG` or `LC`; empty for `CMP` and `VIS`.
        subdomain (`str`): `S`, `T` or `PR` within `FG`, else empty.
        query_modality (`str`): one of `MODALITIES`; the corpus is always video.
        metric (`str`): `recall@1`, `recall@10` or `precision@1`.
        n_query (`int`): published number of queries.
        n_corpus (`int`): published number of videos; of candidates a query where `has_candidates`.
        corpus_duration_s (`float`): published mean length of a video, seconds.
        query_words (`float` or `None`): published mean length of a query's text.
        source (`str`): where the originals come from.
        query_field (`str`): what of the source becomes the query.
        instruction (`str`): prompt of the query side; the corpus side carries none.
    """

    key: str
    name: str
    task: str
    domain: str
    subdomain: str
    query_modality: str
    metric: str
    n_query: int
    n_corpus: int
    corpus_duration_s: float
    query_words: float | None
    source: str
    query_field: str
    instruction: str

    def __post_init__(self):
        name, _, k = self.metric.partition("@")
        if name not in METRICS or not k.isdigit() or int(k) < 1:
            raise ValueError(f"{self.key}: metric {self.metric!r}; write recall@k or precision@k with k >= 1.")
        if self.query_modality not in MODALITIES:
            raise ValueError(f"{self.key}: query modality {self.query_modality!r}; choose one of {MODALITIES}.")

    @property
    def k(self) -> int:
        """Cut-off of the metric."""
        return int(self.metric.partition("@")[2])

    @property
    def has_candidates(self) -> bool:
        """Whether each query ranks a list of its own (config `<key>-top_ranked`) instead of the whole corpus."""
        return self.task == "CMP"

    @property
    def configs(self) -> tuple[str, ...]:
        """Names of the dataset's configs in the benchmark repo."""
        parts = ("corpus", "queries", "qrels", "top_ranked") if self.has_candidates else ("corpus", "queries", "qrels")
        return tuple(f"{self.key}-{part}" for part in parts)


def abilities(task: Task) -> tuple[str, ...]:
    """The abilities that a task's score enters, from broad to narrow.

    >>> abilities(TASKS["crb_s"])
    ('TXT', 'FG', 'S')
    >>> abilities(TASKS["ms_ti"])
    ('CMP',)
    """
    return tuple(ability for ability in (task.task, task.domain, task.subdomain) if ability)


def get_tasks(keys=None) -> list[Task]:
    """Tasks by key, in the paper's order; all 16 by default.

    Args:
        keys (iterable of `str`, *optional*): which ones; repeats count once.

    Raises:
        ValueError: a key that UVRB does not have.
    """
    wanted = set(TASKS if keys is None else keys)
    unknown = sorted(wanted - set(TASKS))
    if unknown:
        raise ValueError(f"Unknown dataset key(s) {', '.join(unknown)}; choose from {', '.join(TASKS)}.")
    return [task for key, task in TASKS.items() if key in wanted]


def _read_tasks(path: Path) -> dict[str, Task]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["key"]: _task(row) for row in csv.DictReader(file)}


def _task(row: dict[str, str]) -> Task:
    numbers = {
        "n_query": int(row["n_query"]),
        "n_corpus": int(row["n_corpus"]),
        "corpus_duration_s": float(row["corpus_duration_s"]),
        "query_words": float(row["query_words"]) if row["query_words"] else None,
    }
    return Task(**{**row, **numbers})


TASKS: dict[str, Task] = _read_tasks(Path(__file__).with_name("datasets.csv"))
