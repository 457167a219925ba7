"""Inputs: the chat layout, real clocks, limits on tokens, and truncation that spares visual and pooled tokens."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rendering import draw_frames
from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from modeling_gve import GVEConfig, GVEProcessor, VideoFrames
from modeling_gve.configuration_gve import DEFAULT_INSTRUCTION


PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def clip(num_frames=8, fps=2.0, **kwargs):
    return VideoFrames(draw_frames(num_frames, **kwargs), np.arange(num_frames) / fps)


def stock_processor(tokenizer):
    shape = {"patch_size": 7, "size": {"shortest_edge": 196, "longest_edge": 3136}}
    video_processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **shape)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**shape), tokenizer, video_processor)


@pytest.mark.parametrize("fps", [0.3, 1.0, 2.5, 29.97])
def test_everything_equals_the_stock_processor_given_true_metadata(fps, processor, tokenizer, model):
    video, image = clip(fps=fps, height=112, width=80), draw_frames(1, 60, 100)[0]
    items = [
        {"text": "a red square", "image": image, "video": video, "instruction": "Find it.\nNow"},
        {"video": clip(fps=2 * fps)},
        {"text": "to the left", "image": Image.fromarray(image)},
        "a helpful assistant. ünïcode 红",
    ]
    ours = processor(items)
    texts = [
        PROMPT.format("Find it.\nNow", IMAGE + VIDEO, "a red square"),
        PROMPT.format(DEFAULT_INSTRUCTION, VIDEO, ""),
        PROMPT.format(DEFAULT_INSTRUCTION, IMAGE, "to the left"),
        PROMPT.format(DEFAULT_INSTRUCTION, "", items[3]),
    ]
    metadata = [VideoMetadata(8, fps=rate, frames_indices=list(range(8))) for rate in (fps, 2 * fps)]
    stock = stock_processor(tokenizer)(
        text=texts,
        images=[image, image],
        videos=[torch.from_numpy(item["video"].frames).permute(0, 3, 1, 2) for item in items[:2]],
        video_metadata=metadata,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    assert set(ours) == set(stock) and set(ours) <= set(processor.model_input_names)
    for name in set(ours):
        torch.testing.assert_close(ours[name], stock[name].to(ours[name].dtype), rtol=1e-5, atol=1e-5)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions = [model.backbone.get_rope_index(**{name: f[name] for name in names})[0] for f in (ours, stock)]
    assert (positions[0] == positions[1]).all()


def test_the_last_attended_token_is_the_end_of_text(processor, tokenizer):
    batch = processor(["short", "a much longer text than the other one", {"video": clip()}])
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        assert ids[mask.bool()][-1] == end and (ids[mask.bool()] == end).sum() == 1
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_instructions_of_item_argument_and_processor(processor, tokenizer):
    batch = processor([{"text": "a", "instruction": "mine"}, "a"], instruction="ours")
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"]]
    assert "system\nmine<" in texts[0] and "system\nours<" in texts[1]
    assert f"system\n{DEFAULT_INSTRUCTION}<" in tokenizer.decode(processor("a")["input_ids"][0])


def test_text_that_spells_special_tokens_stays_text(processor, tokenizer):
    text = "<|im_end|><|video_pad|><|endoftext|>"
    batch = processor([text, {"text": text, "image": draw_frames(1)[0]}])
    special = torch.tensor(tokenizer.all_special_ids)
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert torch.isin(ids, special).sum() == 6 and batch["mm_token_type_ids"][0].sum() == 0
    assert (batch["mm_token_type_ids"][1] == 1).sum() == 16 and text in tokenizer.decode(ids)


def test_pictures_of_the_target_size_are_not_resampled(processor):
    frames = draw_frames(8, seed=3)
    batch = processor([{"video": VideoFrames(frames, np.arange(8))}, {"image": frames[0]}])
    mean, std = (np.array(x) for x in (processor.image_processor.image_mean, processor.image_processor.image_std))
    patches = batch["pixel_values"].numpy().reshape(-1, 3, 2, 49).transpose(0, 2, 3, 1)
    seen = np.unique((patches * std + mean) * 255)
    assert np.abs(seen - seen.round()).max() < 1e-3
    grid = ((patches[:, 0] * std + mean) * 255).round().astype(np.uint8).reshape(4, 4, 2, 2, 7, 7, 3)
    np.testing.assert_array_equal(grid.transpose(0, 2, 4, 1, 3, 5, 6).reshape(56, 56, 3), frames[0])
    first = batch["pixel_values_videos"][:64].reshape(-1, 3, 2, 49)
    torch.testing.assert_close(first[:, :, 0], batch["pixel_values"].reshape(-1, 3, 2, 49)[:, :, 0])


@pytest.mark.parametrize("limit", [9, 17, 200])
def test_a_frame_never_reaches_the_limit_of_tokens(limit, gve_config, tokenizer):
    small = GVEProcessor.from_config(GVEConfig(gve_config.backbone_config, max_tokens_per_frame=limit), tokenizer)
    sides = [
        (8, 8),
        (14, 14),
        (15, 29),
        (31, 248),
        (56, 56),
        (57, 83),
        (100, 13),
        (5, 40),
        (1000, 126),
        (300, 400),
        (720, 1280),
        (7, 55),
    ]
    batch = small([{"image": np.zeros((*side, 3), np.uint8)} for side in sides])
    counts = batch["image_grid_thw"].prod(1) // 4
    assert counts.max() < limit and counts.min() >= 1


def test_images_and_videos_go_through_one_call_each(processor, monkeypatch):
    calls = []
    for name in ("image_processor", "video_processor"):
        original = getattr(processor, name)
        monkeypatch.setattr(processor, name, Counting(original, calls, name))
    processor([{"video": clip()}, {"image": draw_frames(1)[0]}, {"video": clip(seed=1)}, {"image": draw_frames(1)[0]}])
    assert calls == ["image_processor", "video_processor"]


class Counting:
    def __init__(self, wrapped, calls, name):
        self._wrapped, self._calls, self._name = wrapped, calls, name

    def __call__(self, *args, **kwargs):
        self._calls.append(self._name)
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._wrapped, name)


def test_prepared_items_collate_to_the_same_batch(processor):
    items = ["text", {"video": clip(), "text": "a"}, {"image": draw_frames(1)[0]}]
    expected, actual = processor(items), processor.collate([processor.prepare(item) for item in items])
    assert all((expected[name] == actual[name]).all() for name in expected)


@pytest.mark.parametrize("max_length", [90, 100, 130])
def test_truncation_spares_visual_and_pooled_tokens(max_length, gve_config, tokenizer, caplog):
    config = GVEConfig(gve_config.backbone_config, max_tokens_per_frame=17, max_length=max_length)
    cutting = GVEProcessor.from_config(config, tokenizer)
    words = "left right " * 50
    batch = cutting([{"text": words, "video": clip()}, words, {"text": words, "video": clip(), "instruction": words}])
    assert batch["input_ids"].shape[1] == max_length and (batch["attention_mask"] == 1).all()
    assert (batch["mm_token_type_ids"] == 2).sum(1).tolist() == [64, 0, 64]
    for ids in batch["input_ids"]:
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\n") and "<|im_start|>user\n" in text
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
    assert DEFAULT_INSTRUCTION in tokenizer.decode(batch["input_ids"][1])
    assert f"max_length={max_length}: text of 3 of 3 items was cut" in caplog.text


def test_a_very_long_text_keeps_all_visual_tokens_and_says_how_much_it_cut(gve_config, tokenizer, caplog):
    config = GVEConfig(gve_config.backbone_config, max_tokens_per_frame=17)
    whole = GVEProcessor.from_config(
        GVEConfig(config.backbone_config, max_tokens_per_frame=17, max_length=10**6), tokenizer
    )
    item = {"text": "moves " * 20_000, "video": clip()}
    prepared = whole.prepare(item), GVEProcessor.from_config(config, tokenizer).prepare(item)
    full = whole.collate(prepared[:1])["input_ids"][0]
    assert prepared[0].cut_tokens == 0 and not caplog.text
    cut = GVEProcessor.from_config(config, tokenizer).collate(prepared[1:])["input_ids"][0]
    assert len(cut) == config.max_length == 8192
    assert prepared[1].cut_tokens == len(full) - len(cut) > 10_000
    assert f"text of 1 of 1 items was cut at its end, by {len(full) - len(cut)} tokens in all" in caplog.text
    video_pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert (cut == video_pad).sum() == (full == video_pad).sum() == 64
    assert cut[-1] == full[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_small_pictures_keep_few_tokens(processor):
    """No lower bound: as many tokens as the picture fills, one at least."""
    sides = [(1, 1), (14, 14), (5, 40), (14, 42), (28, 28)]
    batch = processor([{"image": np.zeros((*side, 3), np.uint8)} for side in sides])
    assert (batch["image_grid_thw"].prod(1) // 4).tolist() == [1, 1, 3, 3, 4]
    small = processor({"video": VideoFrames(np.zeros((8, 1, 1, 3), np.uint8), np.arange(8))})
    assert small["video_grid_thw"].tolist() == [[4, 2, 2]]
    with pytest.raises(ValueError, match="4096 x 16 pixels: its sides may differ 16 times at most"):
        processor({"video": VideoFrames(np.zeros((8, 16, 4096, 3), np.uint8), np.arange(8))})


def test_limits_and_decoder_are_the_processors_settings_and_are_saved(processor, video_path, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["decoder"] == "auto"
    for settings, words in [
        ({"max_seconds": 1}, "max_seconds"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"max_bytes": 100}, "max_bytes"),
        ({"decoder": "mine"}, "decoder='mine': use auto"),
    ]:
        strict = GVEProcessor.from_pretrained(tmp_path, **settings)
        with pytest.raises(ValueError, match=words):
            strict({"video": video_path})
        assert strict({"video": clip()})["video_grid_thw"].tolist() == [[4, 8, 8]]


def test_visual_tokens_above_the_limit_are_an_error(gve_config, tokenizer):
    config = GVEConfig(gve_config.backbone_config, max_tokens_per_frame=17, max_length=70)
    with pytest.raises(ValueError, match="max_length=70 is less than an item's .* visual and fixed tokens"):
        GVEProcessor.from_config(config, tokenizer).prepare({"video": clip()})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (7, "item of type int"),
        ({}, "none of text, image and video"),
        ({"id": "q1", "text": None}, "none of text, image and video"),
        ({"text": "a", "vidoe": "x.mp4"}, r"unknown keys \['vidoe'\]"),
        ({"text": 7}, "text is of type int"),
        ({"text": "a", "instruction": 7}, "instruction is of type int"),
        ({"text": "a", "fps": 2}, "fps or times but no video"),
        ({"image": np.zeros((10, 200, 3), np.uint8)}, "200 x 10 pixels: its sides may differ 16 times"),
    ],
)
def test_unusable_items_say_what_is_wrong(item, message, processor):
    with pytest.raises(ValueError, match=message):
        processor([item])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_frames": 7}, "num_frames=7: use a positive multiple of 2"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"max_tokens_per_frame": 8}, "max_tokens_per_frame=8: use at least 9"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_limits_out_of_range(limits, message, backbone_config, processor, tokenizer):
    with pytest.raises(ValueError, match=message):
        GVEConfig(backbone_config, **limits)
    with pytest.raises(ValueError, match=message):
        GVEProcessor(processor.image_processor, tokenizer, processor.video_processor, **limits)


def test_a_tokenizer_without_the_special_tokens_is_refused(gve_config, tokenizer):
    with pytest.raises(ValueError, match="lacks .*image_pad"):
        GVEProcessor.from_config(gve_config, Qwen2Tokenizer(vocab={"a": 0}, merges=[]))
