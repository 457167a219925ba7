"""A remembered tower gives what the tower gives, asks it once a medium, and keeps that over processes."""

import numpy as np
import pytest
import torch

from modeling_gve import GVEConfig, GVEModel, GVEProcessor
from modeling_gve.vision_memory import VisionMemory


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def model_and_processor(request, backbone_config, qwen3_config, tokenizer):
    torch.manual_seed(3)
    backbone = backbone_config if request.param == "qwen2_5_vl" else qwen3_config
    model = GVEModel(GVEConfig(backbone_config=backbone, max_tokens_per_frame=17)).eval()
    model.backbone.visual.requires_grad_(False)
    return model, GVEProcessor.from_config(model.config, tokenizer)


def items():
    """Pictures and videos of several sizes, some twice."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (side, 56, 3), dtype=np.uint8) for side in (28, 56)]
    videos = [generator.integers(0, 256, (8, 28, side, 3), dtype=np.uint8) for side in (28, 56)]
    media = [{"image": picture} for picture in pictures]
    media += [{"video": video, "fps": 2.0} for video in videos]
    return ["a text", *media, media[0] | {"text": "turned"}, media[2] | {"text": "faster"}]


def count_calls(visual):
    """How many media its patch embedding sees."""
    calls = []
    visual.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_embeddings_are_the_towers_and_each_medium_is_seen_once(model_and_processor, tmp_path):
    model, processor = model_and_processor
    expected = model.encode(items(), processor=processor)
    memory = VisionMemory(model.backbone.visual, tmp_path)
    calls = count_calls(model.backbone.visual)
    for _ in range(2):
        torch.testing.assert_close(model.encode(items(), processor=processor), expected, atol=1e-6, rtol=0)
    assert len(calls) == len(memory) == 4


@pytest.mark.parametrize("differ", [False, True])
def test_features_do_not_depend_on_what_is_computed_beside(model_and_processor, differ, tmp_path):
    """Groups of one shape where these have the bits of their members alone, and none where they have not."""
    model, processor = model_and_processor
    generator = np.random.default_rng(1)
    videos = [{"video": generator.integers(0, 256, (8, 28, 28, 3), dtype=np.uint8), "fps": 2.0} for _ in range(19)]
    inputs = processor(videos)
    visual, sizes = model.backbone.visual, []
    compute = visual.forward

    def forward(pixels, grid_thw, **kwargs):
        sizes.append(len(grid_thw))
        output = compute(pixels, grid_thw=grid_thw, **kwargs)
        if differ and len(grid_thw) > 1:
            output.pooler_output = output.pooler_output.nextafter(torch.tensor(torch.inf))
        return output

    visual.forward = forward
    VisionMemory(visual, tmp_path)
    pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    found = visual.forward(pixels, grids).pooler_output
    alone = [compute(part, grid_thw=grid[None]) for part, grid in zip(pixels.split(grids.prod(1).tolist()), grids)]
    alone = torch.cat([each.pooler_output for each in alone])
    assert torch.equal(found, alone)
    group = compute(pixels[: grids[:8].prod(1).sum()], grid_thw=grids[:8]).pooler_output
    same = not differ and torch.equal(group, alone[: len(group)])  # on every machine seen so far
    assert sizes == [1] * 8 + [8] + ([8, 8, 1, 1, 1] if same else [1] * 19)


def test_gradients_are_the_towers(model_and_processor, tmp_path):
    model, processor = model_and_processor
    inputs = processor(items())

    def gradients():
        model.zero_grad()
        model(**inputs).embeddings[:, 0].sum().backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    expected = gradients()
    VisionMemory(model.backbone.visual, tmp_path)
    gradients()
    found = gradients()  # from memory
    assert found.keys() == expected.keys() and not any("visual" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_kept_on_disk_for_the_same_tower_only(model_and_processor, tmp_path):
    model, processor = model_and_processor
    memory = VisionMemory(model.backbone.visual, tmp_path)
    first = model.encode(items(), processor=processor)
    memory.save()
    memory.save()  # nothing new: no second file
    assert [path.suffix for path in memory.folder.iterdir()] == [".safetensors"]

    same = GVEModel(model.config).eval()
    same.load_state_dict(model.state_dict())
    same.backbone.visual.requires_grad_(False)
    again = VisionMemory(same.backbone.visual, tmp_path)
    calls = count_calls(same.backbone.visual)
    assert len(again) == 4 and torch.equal(same.encode(items(), processor=processor), first) and not calls

    with torch.no_grad():
        next(same.backbone.visual.parameters()).add_(1e-3)
    del same.backbone.visual.forward
    assert len(VisionMemory(same.backbone.visual, tmp_path)) == 0


def test_beyond_its_limit_it_computes(model_and_processor, tmp_path):
    model, processor = model_and_processor
    expected = model.encode(items(), processor=processor)
    memory = VisionMemory(model.backbone.visual, tmp_path, limit_bytes=1)
    torch.testing.assert_close(model.encode(items(), processor=processor), expected, atol=1e-6, rtol=0)
    memory.save()
    assert len(memory) == 0 and not memory.folder.exists()


def test_a_tower_that_learns_is_refused(model_and_processor, tmp_path):
    model, _ = model_and_processor
    model.backbone.visual.requires_grad_(True)
    with pytest.raises(ValueError, match="only a frozen vision tower"):
        VisionMemory(model.backbone.visual, tmp_path)
