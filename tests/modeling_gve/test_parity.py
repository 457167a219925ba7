"""The parity command: every way of embedding agrees with transformers' own body, and a wrong one is told."""

import pytest
import torch

from modeling_gve import GVEModel, parity


@pytest.fixture(scope="module")
def repo(family_model, family_processor, tmp_path_factory):
    """A GVE repo of each backbone in turn."""
    path = tmp_path_factory.mktemp("parity") / "gve-tiny"
    family_model.save_pretrained(path)
    family_processor.save_pretrained(path)
    return str(path)


def test_items_are_of_every_kind_and_fill_a_batch(processor):
    items, kinds = parity.make_items()
    assert len(items) == 16 and set(kinds) == set(parity.KINDS)
    lengths = {processor(item)["input_ids"].shape[1] for item in items}
    assert len(lengths) > 10


def test_every_way_of_embedding_agrees_with_the_plain_body(repo, family, capsys):
    assert parity.main([repo]) == 0
    printed = capsys.readouterr().out
    assert "All differences are below 1e-05" in printed and "not installed" not in printed
    for way in ("left", "16", "shuffled", "no shortcut", "all but vision", "reloaded", "new keys", "mteb"):
        assert f"{way}: done" in printed
    assert ("legacy keys: done" in printed) == (family == "qwen2_5_vl")  # Qwen3-VL is younger than the new layout


def test_a_wrong_way_is_told_and_ends_with_1(repo, monkeypatch, capsys):
    monkeypatch.setattr("modeling_gve.modeling_gve.last_attended", lambda mask: mask.sum(1) - 2)
    monkeypatch.setattr(parity, "SHORTCUTS", ())
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert parity.main([repo]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.err and "batches of 16" in captured.err and "not installed" in captured.out


def test_what_was_not_compared_does_not_pass():
    assert parity.passes({"text": 1e-7}) and not parity.passes({"text": 1e-5})
    assert not parity.passes({"text": float("nan")}) and not parity.passes({"text": -1.0})


def test_the_reference_runs_on_stock_classes_only(model, processor):
    fast = [type(module) for module in model.backbone.modules() if not parity._is_stock(module)]
    assert len(fast) == 4  # patch embedding, two vision attentions, the last decoder layer
    parity.plain_embeddings(model, processor, ["a"])
    assert all(parity._is_stock(module) for module in model.backbone.modules())
    model.use_shortcuts()
    assert [type(module) for module in model.backbone.modules() if not parity._is_stock(module)] == fast


def test_a_backbone_is_compared_too(backbone_checkpoint):
    model, processor = parity.load(backbone_checkpoint)
    assert isinstance(model, GVEModel) and model.dtype == torch.float32 and processor.num_frames == 8


def test_a_path_without_a_model_ends_with_2(tmp_path, capsys):
    assert parity.main([str(tmp_path / "gone")]) == 2
    assert "cannot load" in capsys.readouterr().err
