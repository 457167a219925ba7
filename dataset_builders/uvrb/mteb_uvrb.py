"""UVRB for mteb: 16 tasks and a benchmark object, for an unmodified mteb.

```python
import mteb
from dataset_builders.uvrb.mteb_uvrb import UVRB, uvrb_benchmark

mteb.evaluate(model, UVRB)                                      # org/uvrb on the Hub
mteb.evaluate(model, uvrb_benchmark("build/hub/org/uvrb-nano"))  # a local flavour
```

Each dataset is a subset `<key>` of one repo, in the layout that mteb's retrieval loader reads; instructions are the
tasks' prompts. mteb decodes videos with torchcodec, which needs FFmpeg's shared libraries.
"""

from mteb import Benchmark
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from dataset_builders.uvrb.tasks import abilities, get_tasks


PAPER = "https://arxiv.org/abs/2510.27571"
CITATION = r"""
@misc{guo2025universal,
  archiveprefix = {arXiv},
  eprint = {2510.27571},
  title = {Towards Universal Video Retrieval: Generalizing Video Embedding via Synthesized Multimodal Pyramid Curriculum},
  year = {2025},
}
"""  # noqa: E501
CATEGORIES = {"text": "t2v", "image": "i2v", "video": "v2v", "text+image": "it2v", "text+video": "vt2v"}


def task_class(task, path="org/uvrb", revision="main"):
    """The mteb task of one dataset.

    Args:
        task (`Task`): the dataset.
        path (`str`): repo on the Hub, or a folder.
        revision (`str`): of the repo.

    Returns:
        subclass of `AbsTaskRetrieval`
    """
    metric, _, k = task.metric.partition("@")
    metadata = TaskMetadata(
        name=f"UVRB-{task.name}",
        description=f"{task.name} as in the Universal Video Retrieval Benchmark ({', '.join(abilities(task))}): "
        f"{task.query_modality} queries against videos. Source: {task.source}.",
        reference=PAPER,
        dataset={"path": path, "revision": revision},
        type="Any2AnyRetrieval",
        category=CATEGORIES[task.query_modality],
        modalities=list(dict.fromkeys([*task.query_modality.split("+"), "video"])),
        eval_splits=["test"],
        # A dictionary makes the key the subset, and so the prefix of the configs.
        eval_langs={task.key: ["eng-Latn"]},
        main_score=f"{metric}_at_{k}",
        prompt={"query": task.instruction},
        bibtex_citation=CITATION,
    )
    return type(f"UVRB{task.key.title().replace('_', '')}", (AbsTaskRetrieval,), {"metadata": metadata})


def uvrb_benchmark(path="org/uvrb", revision="main", keys=None):
    """The benchmark over a flavour of UVRB.

    Args:
        path (`str`): repo on the Hub, or a folder.
        revision (`str`): of the repo.
        keys (iterable of `str`, *optional*): datasets; all 16 by default.

    Returns:
        `mteb.Benchmark`: its tasks in the paper's order.
    """
    return Benchmark(
        name="UVRB",
        tasks=[task_class(task, path, revision)() for task in get_tasks(keys)],
        description="16 video retrieval datasets by what the query is (text, text with image or video, image, video) "
        "and what it asks for (coarse, spatial, temporal, partially relevant, long).",
        reference=PAPER,
        citation=CITATION,
    )


UVRB = uvrb_benchmark()
