"""The model: pooling, padding, the clock, the fast vision path, starting from a backbone, and encoding."""

import copy
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, Video
from datasets import Image as ImageFeature
from PIL import Image
from rendering import draw_frames, write_video
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from modeling_gve import GVEConfig, GVEModel, VideoError, VideoFrames, batch_equal_windows, decode_video
from modeling_gve.modeling_gve import pool_last


def clip(num_frames=8, fps=2.0, **kwargs):
    return VideoFrames(draw_frames(num_frames, **kwargs), np.arange(num_frames) / fps)


@pytest.fixture
def mixed_items():
    return [
        "a red square",
        {"video": clip(), "text": "moves to the left", "instruction": "Find the video."},
        "a text that is much longer than the others, so that they are padded a lot when they share a batch with it "
        * 2,
        {"image": draw_frames(1, 56, 28)[0]},
        {"image": draw_frames(1, seed=2)[0], "video": clip(fps=0.5, seed=1), "text": "both"},
    ]


def pad_left(batch):
    left = dict(batch)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        padding = (batch["attention_mask"] == 0).sum(1).tolist()
        left[name] = torch.stack([row.roll(shift) for row, shift in zip(batch[name], padding)])
    return left


def test_pooling_takes_the_last_attended_token():
    hidden = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    assert pool_last(hidden, mask).flatten().tolist() == [3, 5, 11]


def test_left_and_right_padding_agree(model, processor, mixed_items):
    batch = processor(mixed_items)
    with torch.no_grad():
        right, left = model(**batch).embeddings, model(**pad_left(batch)).embeddings
    torch.testing.assert_close(right, left, rtol=0, atol=1e-5)
    torch.testing.assert_close(right.norm(dim=1), torch.ones(5))


def test_embeddings_equal_those_of_the_stock_backbone(model, processor, mixed_items):
    """Against transformers' own body with an explicit mask and its own vision loops, one token pooled by hand."""
    stock = Qwen2_5_VLModel(model.config.backbone_config).eval()
    stock.load_state_dict(model.backbone.state_dict())
    batch = processor(mixed_items)
    with torch.no_grad():
        hidden = stock(**batch).last_hidden_state
        lengths = batch["attention_mask"].sum(1)
        expected = torch.stack([row[length - 1] for row, length in zip(hidden, lengths)])
        torch.testing.assert_close(
            model(**batch).embeddings, torch.nn.functional.normalize(expected, dim=1), rtol=0, atol=1e-5
        )


def test_embeddings_do_not_depend_on_batch_size_or_order(model, processor, mixed_items):
    expected = model.encode(mixed_items, processor, batch_size=1)
    for batch_size in (2, 3, 32):
        torch.testing.assert_close(
            model.encode(mixed_items, processor, batch_size=batch_size), expected, rtol=0, atol=1e-5
        )
    backwards = model.encode(mixed_items[::-1], processor, batch_size=2)
    torch.testing.assert_close(backwards.flip(0), expected, rtol=0, atol=1e-5)


def test_the_clock_of_the_frames_matters(model, processor):
    slow, fast, again = model.encode([{"video": clip(fps=rate)} for rate in (1, 8, 1)], processor)
    assert (slow - fast).abs().max() > 1e-3
    torch.testing.assert_close(slow, again)


def slowed(path, target, factor):
    """The same packets in a file whose clock runs slower; encoding anew would change pixels."""
    with av.open(str(path)) as source, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.duration = (
                    factor * value for value in (packet.pts, packet.dts, packet.duration)
                )
                packet.stream = stream
                copy.mux(packet)
    return target


def test_the_clock_inside_a_file_matters(model, processor, tmp_path):
    """The same frames in two files: only the presentation times differ."""
    fast = write_video(tmp_path / "fast.mp4", draw_frames(8), fps=8)
    paths = [slowed(fast, tmp_path / "slow.mp4", 8), fast]
    videos = [decode_video(path) for path in paths]
    assert (videos[0].frames == videos[1].frames).all()
    assert videos[0].times[-1] == pytest.approx(8 * videos[1].times[-1])
    slow, fast = model.encode([{"video": path} for path in paths], processor)
    assert (slow - fast).abs().max() > 1e-3


def test_the_order_of_the_frames_matters(model, processor):
    forward = clip()
    backward = VideoFrames(forward.frames[::-1], forward.times)
    a, b = model.encode([{"video": forward}, {"video": backward}], processor)
    assert (a - b).abs().max() > 1e-3


def test_token_types_are_found_when_a_collator_drops_them(model, processor, mixed_items):
    batch = processor(mixed_items)
    with torch.no_grad():
        expected = model(**batch).embeddings
        del batch["mm_token_type_ids"]
        assert (model(**batch).embeddings == expected).all()


def test_a_dropped_clock_is_an_error(model, processor):
    batch = processor({"video": clip()})
    del batch["second_per_grid_ts"]
    with pytest.raises(ValueError, match="without second_per_grid_ts"):
        model(**batch)


@pytest.mark.parametrize("grids", [[[4, 8, 8]] * 3, [[4, 8, 8], [2, 6, 10], [1, 12, 4]], [[1, 2, 2]]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_fast_vision_path_equals_the_stock_path(grids, attention, backbone_config):
    torch.manual_seed(0)
    stock = Qwen2_5_VLModel(
        copy.deepcopy(backbone_config)
    ).visual.double()  # in float64 only a wrong result can differ by 1e-6
    stock.set_attn_implementation(attention)
    fast = batch_equal_windows(batch_equal_windows(copy.deepcopy(stock)))
    assert list(fast.state_dict()) == list(stock.state_dict())
    grids = torch.tensor(grids)
    results = []
    for visual in (stock, fast):
        pixels = torch.randn(int(grids.prod(1).sum()), 294, generator=torch.Generator().manual_seed(1)).double()
        pixels.requires_grad_()
        output = visual(pixels, grid_thw=grids).pooler_output
        output.sin().sum().backward()
        results.append([output, pixels.grad, *(parameter.grad for parameter in visual.parameters())])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_fast_vision_path_runs_in_the_full_model(backbone_config, processor):
    torch.manual_seed(0)
    full = Qwen2_5_VLForConditionalGeneration(backbone_config)
    batch = processor([{"video": clip(), "text": "a"}, {"video": clip(seed=1), "text": "b"}])
    expected = full(**batch).logits
    batch_equal_windows(full.model.visual)
    torch.testing.assert_close(full(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_without_checkpointing(gve_config, processor):
    torch.manual_seed(0)
    model = GVEModel(copy.deepcopy(gve_config)).train()
    batch = processor([{"video": clip(), "text": "a"}, "b"])
    gradients = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**batch).embeddings[:, 0].sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "k_proj.bias" not in name)


@pytest.mark.parametrize("made", ["new", "loaded"])
def test_attention_is_causal_and_can_be_exchanged(made, gve_config, backbone_checkpoint, processor, mixed_items):
    model = (
        GVEModel(copy.deepcopy(gve_config)).eval() if made == "new" else GVEModel.from_pretrained(backbone_checkpoint)
    )
    GVEConfig(backbone_config=model.config.backbone_config)  # must leave the model as it is
    modules = (model.config, model.backbone.visual.config, model.backbone.language_model.config)
    assert [config._attn_implementation for config in modules] == ["sdpa"] * 3
    expected = model.encode(mixed_items, processor)
    model.set_attn_implementation("eager")
    assert model.backbone.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model.encode(mixed_items, processor), expected, rtol=0, atol=1e-5)


def test_a_model_from_a_backbone_encodes_without_a_processor(backbone_checkpoint, processor):
    model = GVEModel.from_pretrained(backbone_checkpoint, max_tokens_per_frame=17)
    items = ["a", {"video": clip()}]
    assert (model.encode(items) == model.encode(items, processor)).all()
    assert model._own_processor().max_tokens_per_frame == 17


def test_encode_returns_float32_rows_in_order_and_restores_the_mode(model, processor, mixed_items):
    model.train()
    embeddings = model.encode(mixed_items, processor, batch_size=2)
    assert model.training
    model.eval()
    assert embeddings.dtype == torch.float32 and embeddings.shape == (5, 32) and not embeddings.requires_grad
    torch.testing.assert_close(model.similarity(embeddings, embeddings[:2]), embeddings @ embeddings[:2].T)


def test_encode_of_one_item_of_none_and_of_generators(model, processor):
    one = model.encode("a red square", processor)
    assert one.shape == (1, 32) and model.encode([], processor).shape == (0, 32)
    torch.testing.assert_close(model.encode((text for text in ["a red square"]), processor), one)
    torch.testing.assert_close(model.encode({"text": "a red square", "id": "q7", "image": None}, processor), one)
    assert (model.encode("a red square", processor, instruction="Other.") - one).abs().max() > 1e-3


def test_encode_reads_all_forms_alike(model, processor, video_path, tmp_path):
    video, image = decode_video(video_path), draw_frames(1)[0]
    data = Path(video_path).read_bytes()
    forms = [video_path, data, {"bytes": data, "path": None}, {"bytes": None, "path": video_path}, video]
    items = [{"video": form} for form in forms]
    items.append({"video": video.frames, "times": video.times})
    items.append({"video": [Image.fromarray(frame) for frame in video.frames], "times": video.times})
    embeddings = model.encode(items, processor)
    torch.testing.assert_close(embeddings, embeddings[:1].expand_as(embeddings), rtol=0, atol=1e-5)
    fps = model.encode([{"video": draw_frames(8), "fps": 4}, {"video": clip(fps=4)}], processor)
    torch.testing.assert_close(fps[0], fps[1], rtol=0, atol=1e-6)
    Image.fromarray(image).save(tmp_path / "a.png")
    images = [{"image": form} for form in (image, Image.fromarray(image), str(tmp_path / "a.png"))]
    embeddings = model.encode(images, processor)
    torch.testing.assert_close(embeddings, embeddings[:1].expand_as(embeddings), rtol=0, atol=1e-6)


def test_every_part_of_a_composition_counts(model, processor):
    image, video = draw_frames(1, seed=4)[0], clip(seed=5)
    parts = {"text": "a", "image": image, "video": video}
    names = [("text",), ("image",), ("video",), ("text", "image"), ("text", "video"), ("image", "video"), tuple(parts)]
    embeddings = model.encode([{name: parts[name] for name in chosen} for chosen in names], processor)
    distances = torch.cdist(embeddings, embeddings) + torch.eye(len(names))
    assert distances.min() > 1e-3


def test_encode_reads_a_dataset_row_by_row(model, processor, video_path):
    data = Path(video_path).read_bytes()
    features = Features(
        {"id": Value("string"), "text": Value("string"), "image": ImageFeature(), "video": Video(decode=False)}
    )
    rows = [
        {"id": "0", "text": "a", "image": None, "video": None},
        {"id": "1", "text": None, "image": draw_frames(1)[0], "video": None},
        {"id": "2", "text": None, "image": None, "video": {"bytes": data, "path": None}},
    ]
    dataset = Dataset.from_list(rows, features=features)
    expected = model.encode(["a", {"image": draw_frames(1)[0]}, {"video": video_path}], processor)
    torch.testing.assert_close(model.encode(dataset, processor, batch_size=2), expected, rtol=0, atol=1e-5)


def test_unreadable_items_stop_or_are_skipped_and_reported(model, processor, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"broken" * 99)
    bad = [{"video": str(tmp_path / "broken.mp4")}, {"video": "gone.mp4"}, {"image": b"garbage"}, {"nothing": 1}]
    items = ["a", *bad, {"video": clip()}]
    with pytest.raises(VideoError, match=r"^item 1: gone.mp4: no such video file$"):
        model.encode([items[0], items[2]], processor)
    report = []
    embeddings = model.encode(items, processor, batch_size=2, errors="skip", report=report)
    assert embeddings.isnan().all(1).tolist() == [False, True, True, True, True, False]
    assert [entry["index"] for entry in report] == [1, 2, 3, 4]
    words = ["not a readable video", "no such video file", "not a readable image", "unknown keys"]
    assert all(word in entry["reason"] and "\n" not in entry["reason"] for word, entry in zip(words, report))
    torch.testing.assert_close(embeddings[[0, 5]], model.encode([items[0], items[5]], processor), rtol=0, atol=1e-5)


def test_arguments_of_encode_are_checked(model, processor):
    with pytest.raises(ValueError, match="errors='ignore'"):
        model.encode(["a"], processor, errors="ignore")
    with pytest.raises(ValueError, match="batch_size=0"):
        model.encode(["a"], processor, batch_size=0)
    with pytest.raises(ValueError, match="not loaded from a repo"):
        copy.deepcopy(model).encode(["a"])


def test_encode_says_when_a_repo_has_no_processor(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no processor and no tokenizer: pass processor="):
        GVEModel.from_pretrained(tmp_path).encode("a")
