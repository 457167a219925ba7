"""Encoding: shortcuts, token budget, reading ahead, precisions and Matryoshka dimensions."""

import copy
import io
import pickle
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rendering import draw_frames
from torch.nn.functional import normalize
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

from modeling_gve import GVEConfig, GVEModel, GVEProcessor, quantize_embeddings
from modeling_gve.batching_gve import group_singles as group
from modeling_gve.batching_gve import read_ahead
from modeling_gve.layers_gve import PooledPosition, pool_in_last_layer
from modeling_gve.modeling_gve import SHORTCUTS


def clip(**kwargs):
    return {"video": draw_frames(8, **kwargs), "fps": 2}


@pytest.fixture(scope="module")
def embeddings():
    """Unit vectors of 64 dimensions, a few of which are large, as language models have them."""
    torch.manual_seed(0)
    return normalize(torch.randn(200, 64) * torch.linspace(0.3, 3, 64), dim=-1)


# Shortcuts


def tiny_bodies(backbone_config):
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "initializer_range": 0.2,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    return {
        "qwen2_5_vl": Qwen2_5_VLModel(copy.deepcopy(backbone_config)),
        "qwen3_vl": Qwen3VLModel(
            Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0, 1]})
        ),
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_last_layer_at_one_position_gives_the_same_state_and_gradients(family, backbone_config):
    torch.manual_seed(0)
    body = tiny_bodies(backbone_config)[family].double()  # in float64 only a wrong result can differ by 1e-9
    ids = torch.randint(10, 60, (3, 7))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    last = torch.tensor([6, 3, 6])
    results = []
    for pooled in (None, (last, mask.bool()[:, None, None])):
        if pooled is not None:
            assert pool_in_last_layer(body) and isinstance(body.language_model.layers[-1], PooledPosition)
        body.zero_grad()
        hidden = body(ids, attention_mask=mask, use_cache=False, pooled=pooled).last_hidden_state
        rows = hidden[torch.arange(3), last] if pooled is None else hidden[:, 0]
        assert pooled is None or hidden.shape[1] == 1
        rows.sin().sum().backward()
        used = {name: parameter.grad for name, parameter in body.named_parameters() if parameter.grad is not None}
        results.append({"rows": rows, **{name: gradient.clone() for name, gradient in used.items()}})
    assert set(results[0]) == set(results[1]) and len(results[0]) > 20
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-9)


def test_a_layer_that_cannot_answer_for_one_position_stays_as_it_is(backbone_config):
    config = backbone_config.to_dict()
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    config["text_config"].pop("layer_types")
    sliding = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config))
    assert sliding.language_model.layers[-1].self_attn.sliding_window == 4 and not pool_in_last_layer(sliding)
    shallow = tiny_bodies(backbone_config)["qwen3_vl"]
    shallow.language_model.layers = shallow.language_model.layers[:2]  # visual features are added after both
    assert not pool_in_last_layer(shallow)


def test_shortcuts_leave_weights_device_maps_and_copies_alone(gve_config, processor):
    model = GVEModel(copy.deepcopy(gve_config)).eval()
    names = list(model.state_dict())
    assert "GVEDecoderLayer" in model._no_split_modules
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (twin.encode(["a"], processor) == model.encode(["a"], processor)).all()
    model.use_shortcuts(("no_mask",))
    assert model.shortcuts == {"no_mask"} and list(model.state_dict()) == names
    assert "GVEDecoderLayer" not in model._no_split_modules
    with pytest.raises(ValueError, match=r"unknown shortcuts \['sorting'\]: use any of batching, read_ahead"):
        model.use_shortcuts(("sorting", "vision"))
    assert model.use_shortcuts().shortcuts == set(SHORTCUTS)


# Batches


def lengths_of(groups):
    return [(indices, tuple(features["input_ids"].shape)) for indices, features in groups]


def test_batches_stay_under_the_token_budget_with_their_padding():
    lengths = [3, 3, 4, 9, 2, 2, 2]
    rows = [
        (index, {"input_ids": torch.full((1, n), index), "attention_mask": torch.ones(1, n)})
        for index, n in enumerate(lengths)
    ]
    assert lengths_of(group(rows, 32, 8)) == [
        ([0, 1], (2, 3)),
        ([2], (1, 4)),
        ([3], (1, 9)),
        ([4, 5, 6], (3, 2)),
    ]
    assert lengths_of(group(rows, 2, 1000)) == [
        ([0, 1], (2, 3)),
        ([2, 3], (2, 9)),
        ([4, 5], (2, 2)),
        ([6], (1, 2)),
    ]
    (_, batch), *_ = group(rows[2:4], 32, 1000)
    assert batch["input_ids"].tolist() == [[2] * 9, [3] * 9]  # filled with the end of the first
    assert batch["attention_mask"].sum(1).tolist() == [4, 9]


def test_the_budget_decides_how_many_items_share_a_pass(model, processor, monkeypatch):
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: shapes.append(batch["input_ids"].shape) or forward(**batch))
    texts = ["a" * n for n in (40, 5, 80, 6, 7, 41)]
    expected = model.encode(texts, processor, batch_tokens=1)
    assert [shape[0] for shape in shapes] == [1] * 6
    shapes.clear()
    together = model.encode(texts, processor, batch_tokens=200)
    assert 1 < len(shapes) < 6 and all(rows * length <= 200 for rows, length in shapes)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="batch_tokens=0: use at least 1"):
        model.encode(texts, processor, batch_tokens=0)


# Reading ahead


def test_reading_starts_before_an_item_is_asked_for():
    ready = threading.Event()

    def prepare(item):
        if item["video"] == "2":
            ready.set()
        return item["video"]

    items = [{"video": str(index)} for index in range(6)]
    reader = read_ahead(items, [2, 0, 1, 5, 4, 3], prepare, threads=1)
    index, call = next(reader)
    assert ready.wait(20)  # nobody has called yet
    assert (index, call()) == (2, "2")
    assert [call() for _, call in reader] == ["0", "1", "5", "4", "3"]


def test_threads_change_nothing_and_spare_opened_files(model, processor, video_path, tmp_path):
    opened = io.BytesIO(Path(video_path).read_bytes())
    bad = {"video": str(tmp_path / "gone.mp4")}
    items = [{"video": video_path}, {"video": opened}, bad, "a", {"video": opened, "text": "b"}, clip()] * 2
    runs = []
    for threads in (0, 3):
        report = []
        rows = model.encode(items, processor, errors="skip", report=report, decode_threads=threads)
        assert [entry["index"] for entry in report] == [2, 8] and rows.isnan().any(1).sum() == 2
        runs.append(rows.nan_to_num())
        with pytest.raises(ValueError, match="^item 2: .*gone.mp4: no such video file"):
            model.encode(items[:4], processor, decode_threads=threads)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-6)


class Rows:
    """A dataset that decodes, and cannot decode its second row."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise RuntimeError("cannot decode\nthis")
        return {"text": "abc"[index]}


def test_rows_that_a_dataset_cannot_give_are_skipped_too(model, processor):
    report = []
    rows = model.encode(Rows(), processor, errors="skip", report=report)
    assert report == [{"index": 1, "reason": "cannot decode this"}]
    assert rows.isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="item 1: cannot decode this"):
        model.encode(Rows(), processor)


# Frames, dimensions, precisions


def test_the_number_of_frames_of_a_call(model, processor, gve_config, tokenizer):
    item = {"video": draw_frames(16), "fps": 4}
    fewer = GVEProcessor.from_config(
        GVEConfig(gve_config.backbone_config, num_frames=4, max_tokens_per_frame=17), tokenizer
    )
    assert (model.encode(item, processor, num_frames=4) == model.encode(item, fewer)).all()
    assert processor.num_frames == 8
    assert (model.encode(item, processor, num_frames=4) - model.encode(item, processor)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="num_frames=3: use a positive multiple of 2"):
        model.encode(item, processor, num_frames=3)


def test_truncated_embeddings_are_the_leading_dimensions_normalised_again(model, processor, caplog):
    texts = ["a", "a red square"]
    full = model.encode(texts, processor)
    torch.testing.assert_close(model.encode(texts, processor, truncate_dim=8), normalize(full[:, :8], dim=-1))
    assert "truncate_dim=8: this model was trained without Matryoshka dimensions" in caplog.text
    for dim in (0, 33):
        with pytest.raises(ValueError, match=f"truncate_dim={dim}: use 1 to 32"):
            model.encode(texts, processor, truncate_dim=dim)


def test_matryoshka_dimensions_stand_in_the_config(backbone_config, processor, tmp_path, caplog):
    config = GVEConfig(backbone_config, matryoshka_dims=[8, 32, 16])
    config.save_pretrained(tmp_path)
    config = GVEConfig.from_pretrained(tmp_path)
    assert config.matryoshka_dims == [32, 16, 8]
    model = GVEModel(config).eval()
    model.encode("a", processor, truncate_dim=16)
    assert not caplog.records
    model.encode("a", processor, truncate_dim=12)
    assert "trained for 32, 16, 8 dimensions" in caplog.text
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[64, 8\]: use dimensions from 1 to 32"):
        GVEConfig(backbone_config, matryoshka_dims=[8, 64])


def test_precisions_of_encode(model, processor):
    texts = ["a", "a red square", "moves to the left"]
    full = model.encode(texts, processor)
    encode = partial(model.encode, texts, processor)
    assert encode(precision="bfloat16").dtype == torch.bfloat16
    assert (encode(precision="ubinary", truncate_dim=16) == quantize_embeddings(full[:, :16], "ubinary")).all()
    codes = encode(precision="int8", calibration=full)
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    torch.testing.assert_close(model.similarity(codes, codes), full @ full.T, rtol=0, atol=0.02)


def test_int8_keeps_cosines_within_what_its_step_allows(model, embeddings):
    codes = quantize_embeddings(embeddings, "int8", embeddings)
    step = embeddings.abs().max() / 127
    torch.testing.assert_close(codes.float() * step, embeddings, rtol=0, atol=float(step / 2) + 1e-6)
    errors = model.similarity(codes, codes) - embeddings @ embeddings.T
    assert errors.std() < 2 * step / 12**0.5
    half = quantize_embeddings(normalize(embeddings[:, :32], dim=-1), "int8", embeddings)  # truncated alike
    assert half.abs().max() == 127
    assert quantize_embeddings(2 * embeddings, "int8", embeddings).abs().max() == 127  # clipped, never wrapped


def test_binary_vectors_are_signs_as_sentence_transformers_packs_them(model, embeddings):
    packed = quantize_embeddings(embeddings, "ubinary")
    assert packed.dtype == torch.uint8 and packed.shape == (200, 8)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(embeddings.numpy() > 0, axis=1))
    library = pytest.importorskip("sentence_transformers.util")
    np.testing.assert_array_equal(packed.numpy(), library.quantize_embeddings(embeddings.numpy(), "ubinary"))
    distances = np.unpackbits(packed[0].numpy() ^ packed.numpy(), axis=1).sum(1)
    torch.testing.assert_close(
        model.similarity(packed[:1], packed)[0], torch.from_numpy(1 - 2 * distances / 64).float()
    )
    signs = normalize(torch.where(embeddings > 0, 1.0, -1.0), dim=-1)
    torch.testing.assert_close(model.similarity(embeddings[:2], packed), embeddings[:2] @ signs.T)


def test_what_cannot_be_quantized_is_an_error(model, processor, embeddings):
    with pytest.raises(ValueError, match="precision='int4': use one of float32"):
        model.encode("a", processor, precision="int4")
    with pytest.raises(ValueError, match="needs calibration= of shape .M, 32., float embeddings: got none"):
        model.encode("a", processor, precision="int8")
    with pytest.raises(ValueError, match=r"got shape \(5, 16\)"):
        model.encode("a", processor, precision="int8", calibration=embeddings[:5, :16])
    with pytest.raises(ValueError, match="12 is no multiple of 8"):
        model.encode("a", processor, precision="ubinary", truncate_dim=12)
    with pytest.raises(ValueError, match="cannot mark skipped rows as NaN: pass report="):
        model.encode("a", processor, precision="ubinary", errors="skip")
    report = []
    rows = model.encode(["a", {"image": b"x"}], processor, precision="ubinary", errors="skip", report=report)
    assert [entry["index"] for entry in report] == [1] and not rows[1].any() and rows[0].any()
