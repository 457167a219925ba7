"""Both backbones, tiny and random: configurations, models with their head, and the GVE models of the same weights."""

import copy

import pytest
import torch
from rendering import draw_frames
from tiny_backbones import FULL_MODELS, clip
from transformers import Qwen3VLConfig

from modeling_gve import GVEConfig, GVEModel, GVEProcessor
from training.base_model import SPECIAL_TOKENS


@pytest.fixture(scope="session")
def qwen3_config(tokenizer):
    """Qwen3-VL of some 60 thousand parameters; features of two vision layers enter three decoder layers."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 7,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


@pytest.fixture(scope="session")
def family_configs(backbone_config, qwen3_config):
    return {"qwen2_5_vl": backbone_config, "qwen3_vl": qwen3_config}


@pytest.fixture(scope="session", params=list(FULL_MODELS))
def family(request):
    """Each backbone in turn."""
    return request.param


@pytest.fixture(scope="session")
def full_model(family, family_configs):
    """A random backbone with its head; tests do not change it."""
    torch.manual_seed(3)
    model = FULL_MODELS[family](copy.deepcopy(family_configs[family])).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as constants, which hides mix-ups
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_q" in name), std=0.1)
    return model


@pytest.fixture(scope="session")
def family_model(family, full_model):
    """A GVE model whose body is that of `full_model`; tests do not change it."""
    model = GVEModel(GVEConfig(full_model.config, max_tokens_per_frame=17)).eval()
    model.backbone.load_state_dict(full_model.model.state_dict())
    return model


@pytest.fixture(scope="session")
def family_processor(family_model, tokenizer):
    return GVEProcessor.from_config(family_model.config, tokenizer)


@pytest.fixture
def items():
    """A text, an image, a video and both, with different clocks."""
    return [
        "a red square",
        {"image": draw_frames(1, 56, 28)[0], "text": "to the left"},
        {"video": clip(fps=1.3), "instruction": "Find the video."},
        {"image": draw_frames(1, seed=2)[0], "video": clip(fps=0.5, seed=1, height=112, width=80), "text": "both"},
    ]
