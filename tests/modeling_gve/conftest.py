"""Both backbones, tiny and random: configurations, models with their head, and the GVE models of the same weights."""

import copy

import pytest
import torch
from rendering import draw_frames
from tiny_backbones import FULL_MODELS, clip

from modeling_gve import GVEConfig, GVEModel, GVEProcessor


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
