"""Both backbones: inputs and outputs against transformers' own, checkpoints in every layout, presets."""

import copy
import json

import numpy as np
import pytest
import torch
from rendering import draw_frames
from safetensors.torch import load_file, save_file
from tiny_backbones import body_embeddings, clip, write_checkpoint
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    core_model_loading,
)
from transformers.video_utils import VideoMetadata

from modeling_gve import GVEConfig, GVEModel, GVEProcessor, VideoFrames, batch_equal_windows
from modeling_gve.configuration_gve import DEFAULT_INSTRUCTION


PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LAYOUTS = [(legacy, sharded) for legacy in (False, True) for sharded in (False, True)]


def stock_processor(family, tokenizer):
    """Transformers' processor of a backbone, at the tests' limits."""
    size = {"shortest_edge": 784, "longest_edge": 3136}
    if family == "qwen2_5_vl":
        video_processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, patch_size=7, size=size)
        return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(patch_size=7, size=size), tokenizer, video_processor)
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    eight = {name: 8 * pixels for name, pixels in size.items()}  # it counts the pixels of all frames
    video_processor = Qwen3VLVideoProcessor(cap_pixels_per_frame=False, patch_size=7, size=eight, **mean)
    return Qwen3VLProcessor(Qwen2VLImageProcessor(patch_size=7, size=size, **mean), tokenizer, video_processor)


def stock_inputs(family, tokenizer, texts, images, videos, rates):
    return stock_processor(family, tokenizer)(
        text=texts,
        images=images,
        videos=[torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos],
        video_metadata=[VideoMetadata(8, fps=rate, frames_indices=list(range(8))) for rate in rates],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("fps", [0.3, 2.5])
def test_qwen3_inputs_equal_those_of_its_own_processor_given_true_metadata(fps, qwen3_config, tokenizer):
    config = GVEConfig(qwen3_config, max_tokens_per_frame=17)
    ours = GVEProcessor.from_config(config, tokenizer)
    image, videos = draw_frames(1, 60, 100)[0], [clip(fps=fps, height=112, width=80), clip(fps=2 * fps)]
    items = [
        {"text": "a red square", "image": image, "video": videos[0], "instruction": "Find it.\nNow"},
        {"video": videos[1]},
        {"text": "to the left", "image": image},
        "a helpful assistant. ünïcode 红",
    ]
    texts = [
        PROMPT.format("Find it.\nNow", IMAGE + "<|video_pad|>", "a red square"),
        PROMPT.format(DEFAULT_INSTRUCTION, "<|video_pad|>", ""),
        PROMPT.format(DEFAULT_INSTRUCTION, IMAGE, "to the left"),
        PROMPT.format(DEFAULT_INSTRUCTION, "", items[3]),
    ]
    batch = ours(items)
    stock = stock_inputs("qwen3_vl", tokenizer, texts, [image, image], videos, [fps, 2 * fps])
    assert set(batch) == set(stock) and set(batch) <= set(ours.model_input_names)
    for name in set(batch):
        torch.testing.assert_close(batch[name], stock[name].to(batch[name].dtype), rtol=1e-5, atol=1e-5)
    assert f"<{0.5 / (2 * fps):.1f} seconds>" in tokenizer.decode(batch["input_ids"][1])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    body = GVEModel(config).backbone
    positions = [body.get_rope_index(**{name: inputs[name] for name in names})[0] for inputs in (batch, stock)]
    assert (positions[0] == positions[1]).all()


def test_the_chat_template_renders_what_the_processor_builds(family, family_processor, tokenizer):
    image, video = draw_frames(1)[0], clip()
    messages = [
        {"role": "system", "content": "Find it."},
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "text", "text": "a red square"}, {"type": "image"}],
        },
    ]
    short = [{"role": "user", "content": "left"}]
    texts = [family_processor.apply_chat_template(turn, tokenize=False) for turn in (messages, short)]
    items = [{"text": "a red square", "image": image, "video": video, "instruction": "Find it."}, "left"]
    stock = stock_inputs(family, tokenizer, texts, [image], [video], [2.0])
    assert (family_processor(items)["input_ids"] == stock["input_ids"]).all()


def test_embeddings_equal_those_of_the_backbones_own_body(full_model, family_model, family_processor, items):
    batch = family_processor(items)
    expected = body_embeddings(full_model, batch)
    left = dict(batch)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        left[name] = torch.stack([row.roll(shift) for row, shift in zip(batch[name], shifts)])
    with torch.no_grad():
        for inputs in (batch, left):
            torch.testing.assert_close(family_model(**inputs).embeddings, expected, rtol=0, atol=1e-5)
    one_by_one = torch.cat([body_embeddings(full_model, family_processor([item])) for item in items])
    encoded = family_model.encode(items[::-1], family_processor, batch_size=3).flip(0)
    torch.testing.assert_close(encoded, one_by_one, rtol=0, atol=1e-5)


def test_times_and_order_of_frames_reach_the_model(family_model, family_processor):
    video = clip(fps=1)
    variants = [
        video,
        clip(fps=8),
        VideoFrames(video.frames[::-1], video.times),
        VideoFrames(video.frames, video.times + 60),
    ]
    slow, fast, backward, later = family_model.encode([{"video": each} for each in variants], family_processor)
    assert (slow - fast).abs().max() > 1e-3 and (slow - backward).abs().max() > 1e-3
    torch.testing.assert_close(slow, later, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grids", [[[4, 8, 8]] * 2, [[4, 8, 8], [2, 6, 10], [1, 12, 4]]])
def test_the_fast_vision_path_equals_the_stock_path(grids, family, full_model):
    stock = copy.deepcopy(full_model.model.visual).double()  # in float64 only a wrong result can differ by 1e-6
    fast = batch_equal_windows(batch_equal_windows(copy.deepcopy(stock)))
    changed = sum(type(a) is not type(b) for a, b in zip(stock.modules(), fast.modules()))
    assert changed == 1 + len(stock.blocks) and list(fast.state_dict()) == list(stock.state_dict())
    grids = torch.tensor(grids)
    results = []
    for visual in (stock, fast):
        pixels = torch.randn(int(grids.prod(1).sum()), 294, generator=torch.Generator().manual_seed(1)).double()
        pixels.requires_grad_()
        output = visual(pixels, grid_thw=grids)
        outputs = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        sum(each.sin().sum() for each in outputs).backward()
        results.append([*outputs, pixels.grad, *(parameter.grad for parameter in visual.parameters())])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_qwen3_truncation_spares_visual_tokens_clock_and_pooled_token(qwen3_config, tokenizer):
    config = GVEConfig(qwen3_config, max_tokens_per_frame=17, max_length=260)
    processor = GVEProcessor.from_config(config, tokenizer)
    words = "left right " * 200
    batch = processor([{"text": words, "video": clip()}])
    text = tokenizer.decode(batch["input_ids"][0])
    assert batch["input_ids"].shape == (1, 260) and (batch["mm_token_type_ids"] == 2).sum() == 64
    assert text.count(" seconds>") == 4 and text.endswith("<|im_start|>assistant\n<|endoftext|>")
    with pytest.raises(ValueError, match="max_length=90 is less than an item's .* visual and fixed tokens"):
        GVEProcessor.from_config(GVEConfig(qwen3_config, max_tokens_per_frame=17, max_length=90), tokenizer).prepare(
            {"video": clip()}
        )


@pytest.mark.parametrize(("legacy", "sharded"), LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_load_in_every_layout(
    legacy, sharded, tied, full_model, tokenizer, family_processor, items, tmp_path, monkeypatch
):
    folder = write_checkpoint(tmp_path / "source", full_model, tokenizer, legacy, sharded, tied)
    assert len(list(folder.glob("*.safetensors"))) > 1 or not sharded
    read = []
    materialize = core_model_loading.spawn_materialize
    monkeypatch.setattr(
        core_model_loading, "spawn_materialize", lambda *args, **kwargs: read.append(1) or materialize(*args, **kwargs)
    )
    model, info = GVEModel.from_pretrained(folder, max_tokens_per_frame=17, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(read) == len(model.state_dict())  # all of the body, and never the head
    body = full_model.model.state_dict()
    assert {name.removeprefix("backbone.") for name in model.state_dict()} == set(body)
    assert all((model.state_dict()[f"backbone.{name}"] == value).all() for name, value in body.items())
    assert model.config.max_tokens_per_frame == 17 and not model.training
    batch = family_processor(items)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).embeddings, body_embeddings(full_model, batch), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert set(saved) == set(model.state_dict())  # one layout, wherever it came from
    again, info = GVEModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()) and again.config.backbone_config.to_dict() == model.config.backbone_config.to_dict()
    assert all((again.state_dict()[name] == value).all() for name, value in model.state_dict().items())


def test_the_authors_class_and_its_flat_configuration_load(backbone_config, tokenizer, items, tmp_path):
    class Qwen25VLForEmbedding(Qwen2_5_VLForConditionalGeneration):
        """Stands in for the class of GVE-3B and GVE-7B, which adds no weights."""

    torch.manual_seed(4)
    full = Qwen25VLForEmbedding(copy.deepcopy(backbone_config)).eval()
    folder = write_checkpoint(tmp_path, full, tokenizer, legacy=True, sharded=True, flat=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen25VLForEmbedding"], "auto_map": {"AutoModel": "gone.Qwen25VLForEmbedding"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = GVEModel.from_pretrained(folder, max_tokens_per_frame=17)
    assert "gone" not in model.config.to_json_string() and model.config.embedding_dim == 32
    batch = GVEProcessor.for_model(folder, model.config)(items)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).embeddings, body_embeddings(full, batch), rtol=0, atol=1e-5)


def test_missing_weights_are_an_error_that_lists_them(full_model, tokenizer, tmp_path):
    folder = write_checkpoint(tmp_path, full_model, tokenizer)
    weights = load_file(folder / "model.safetensors")
    gone = [key for key in weights if "visual.blocks.0.mlp" in key or "layers.1.mlp.up_proj" in key]
    save_file({key: weights[key] for key in weights if key not in gone}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks {len(gone)} weights") as error:
        GVEModel.from_pretrained(folder)
    assert all(key.replace("model.", "backbone.", 1) in str(error.value) for key in gone)


def test_other_checkpoints_and_settings_are_refused(backbone_config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a model of type 'bert': use a GVE repo or"):
        GVEModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone of type 'qwen2_vl': use one of qwen2_5_vl, qwen3_vl"):
        GVEConfig({"model_type": "qwen2_vl"})
    with pytest.raises(ValueError, match="no preset 'gve-1b': use one of gve-3b, gve-7b"):
        GVEConfig.from_preset("gve-1b")
    GVEConfig(backbone_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_frames=7"):
        GVEConfig.from_pretrained(tmp_path, num_frames=7)
    assert GVEConfig.from_pretrained(tmp_path, num_frames=4, max_length=99).num_frames == 4


def test_bfloat16_is_close_to_float32(full_model, tokenizer, family_model, family_processor, items, tmp_path):
    folder = write_checkpoint(tmp_path, full_model, tokenizer)
    model = GVEModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    embeddings = model.encode(items, family_processor)
    assert embeddings.dtype == torch.float32
    assert (embeddings * family_model.encode(items, family_processor)).sum(1).min() > 0.98


def test_a_device_map_may_offload_to_disk(full_model, tokenizer, family_model, family_processor, items, tmp_path):
    folder = write_checkpoint(tmp_path / "source", full_model, tokenizer, legacy=True, sharded=True)
    devices = {"backbone.visual": "cpu", "backbone.language_model": "disk"}
    model = GVEModel.from_pretrained(folder, device_map=devices, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == devices
    expected = family_model.encode(items, family_processor)
    torch.testing.assert_close(model.encode(items, family_processor), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kinds", ["text", pytest.param("all", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same(kinds, family_model, family_processor, items):
    torch._dynamo.reset()
    batch = family_processor(items if kinds == "all" else ["a red square", "left"])
    compiled = torch.compile(copy.deepcopy(family_model), backend="eager")
    with torch.no_grad():
        expected = family_model(**batch).embeddings
        torch.testing.assert_close(compiled(**batch).embeddings, expected, rtol=0, atol=1e-5)


def test_gradients_are_those_without_checkpointing(family_model, family_processor, items):
    model = copy.deepcopy(family_model).train()
    batch = family_processor(items[-2:])
    gradients = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model.zero_grad()
        model(**batch).embeddings[:, 0].sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_eager_attention_gives_the_same_as_sdpa(family_model, family_processor, items):
    model = copy.deepcopy(family_model)
    assert model.backbone.visual.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.backbone.visual.config._attn_implementation == "eager"
    expected = family_model.encode(items, family_processor)
    torch.testing.assert_close(model.encode(items, family_processor), expected, rtol=0, atol=1e-5)


# Parameters and dimensions of the published checkpoints, and how many of the former are an untied head.
@pytest.mark.parametrize(
    ("name", "parameters", "head", "dimensions"),
    [
        ("gve-3b", 3_754_622_976, 0, 2048),
        ("gve-7b", 8_292_166_656, 544_997_376, 3584),
        ("qwen3-vl-2b", 2_127_532_032, 0, 2048),
        ("qwen3-vl-4b", 4_437_815_808, 0, 2560),
        ("qwen3-vl-8b", 8_767_123_696, 622_329_856, 4096),
    ],
)
def test_presets_have_the_published_sizes(name, parameters, head, dimensions):
    config = GVEConfig.from_preset(name, num_frames=4)
    with torch.device("meta"):
        model = GVEModel(config)
    embeddings = model.get_input_embeddings().weight
    tied = config.backbone_config.tie_word_embeddings
    assert head == (0 if tied else embeddings.numel())
    assert sum(parameter.numel() for parameter in model.parameters()) + head == parameters
    assert config.embedding_dim == embeddings.shape[1] == dimensions and config.num_frames == 4


def test_a_preset_is_not_changed_by_its_use():
    first = GVEConfig.from_preset("qwen3-vl-4b").to_dict()
    assert GVEConfig.from_preset("qwen3-vl-4b").to_dict() == first
    assert np.isclose(first["backbone_config"]["text_config"]["rope_parameters"]["rope_theta"], 5e6)
