"""UVRB in an unmodified mteb: 16 tasks that run on a local flavour and score as our metric does."""

import hashlib

import datasets
import numpy as np
import pytest
from release_tree import Videos, write_release

from dataset_builders.uvrb.build import build
from dataset_builders.uvrb.sources import open_release
from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.retrieval_data import load_retrieval_data
from evaluate_metrics.uvrb_retrieval.ranking import mean_scores, ranks_from_embeddings


mteb = pytest.importorskip("mteb")


def vector(content):
    """A direction that depends on the content alone."""
    seed = list(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest())
    return np.random.default_rng(seed).standard_normal(8)


def embed(item):
    """Sum over what an item has: a score in the middle, without ties."""
    parts = [value if isinstance(value, str) else value["bytes"] for value in item.values()]
    return np.sum([vector(part) for part in parts], axis=0)


class TinyEncoder:
    """The least that mteb takes for an encoder."""

    def __init__(self):
        overwrites = {"name": "gve/tiny", "revision": "1", "modalities": ["text", "image", "video"]}
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty(overwrites)
        self.prompts = {}

    def encode(self, inputs, *, task_metadata, prompt_type=None, **kwargs):
        self.prompts[task_metadata.name] = task_metadata.prompt["query"]
        names = [name for name in ("text", "image", "video") if name in task_metadata.get_modalities(prompt_type)]
        return np.stack(
            [embed(dict(zip(names, row))) for batch in inputs for row in zip(*(batch[name] for name in names))]
        )

    def similarity(self, left, right):
        import torch

        left, right = torch.as_tensor(left), torch.as_tensor(right)
        return torch.nn.functional.normalize(left) @ torch.nn.functional.normalize(right).T

    def similarity_pairwise(self, left, right):
        return self.similarity(left, right).diagonal()


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    root = tmp_path_factory.mktemp("mteb")
    videos = Videos()
    write_release(root / "src", n_corpus=4, videos=videos)
    (folder,), _ = build(open_release(root / "src"), ["uvrb"], root / "org", root / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets_cache")
        # torchcodec needs FFmpeg's libraries, which not every machine has: the encoder gets the files instead.
        for kind in (datasets.Image, datasets.Video):
            patch.setattr(kind, "decode_example", lambda self, value, token_per_repo_id=None: value)
        yield str(folder)


def test_sixteen_tasks_with_the_protocol_s_metrics_and_prompts():
    from dataset_builders.uvrb.mteb_uvrb import UVRB

    assert UVRB.name == "UVRB" and len(UVRB.tasks) == 16
    for task, facts in zip(UVRB.tasks, TASKS.values()):
        assert task.metadata.main_score == facts.metric.replace("@", "_at_")
        assert task.metadata.prompt == {"query": facts.instruction}
        assert task.metadata.dataset["path"] == "org/uvrb" and task.hf_subsets == [facts.key]


def test_mteb_s_score_is_our_metric_s(repo):
    from dataset_builders.uvrb.mteb_uvrb import uvrb_benchmark

    encoder = TinyEncoder()
    results = mteb.evaluate(encoder, uvrb_benchmark(repo).tasks, cache=None, show_progress_bar=False)
    scores = {result.task_name: result.get_score() for result in results.task_results}
    ours = {}
    for task in TASKS.values():
        data = load_retrieval_data(repo, task)
        sides = [
            np.stack([embed(item) for item in side.items(range(len(side)))]) for side in (data.queries, data.corpus)
        ]
        ranks = ranks_from_embeddings(*sides, data.queries.ids, data.corpus.ids, data.relevant, data.candidates)
        ours[f"UVRB-{task.name}"] = mean_scores(ranks, {task.k})[task.metric]
    assert set(scores) == set(ours)
    for name in ours:
        assert scores[name] == pytest.approx(ours[name], abs=1e-6), name
    assert len(set(ours.values())) > 2
    assert encoder.prompts["UVRB-CameraBench"] == TASKS["cmrb"].instruction
