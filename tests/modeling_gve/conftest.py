"""Both backbones, tiny and random: configurations, models with their head, and checkpoints in every key layout."""

import copy
import json

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from rendering import draw_frames
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from modeling_gve import GVEConfig, GVEModel, GVEProcessor, VideoFrames
from training.base_model import SPECIAL_TOKENS


FULL_MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


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


def clip(num_frames=8, fps=2.0, **kwargs):
    return VideoFrames(draw_frames(num_frames, **kwargs), np.arange(num_frames) / fps)


def body_embeddings(full_model, batch):
    """Embeddings by transformers' own model of the same inputs."""
    with torch.no_grad():
        hidden = full_model.model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)


def write_checkpoint(folder, full_model, tokenizer, legacy=False, sharded=False, tied=False, flat=False):
    """Save a backbone with its head in one of the layouts that exist in the wild."""
    state = {name: value.clone() for name, value in full_model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    if legacy:
        state = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in state.items()
        }
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=60_000 if sharded else "5GB", metadata={"format": "pt"})
    config = full_model.config.to_dict() | {"tie_word_embeddings": tied, "torch_dtype": "float32"}
    if flat:  # as Qwen2.5-VL was published
        text = config.pop("text_config")
        config = {**text, **config, "rope_scaling": text["rope_parameters"], "rope_theta": 1e4}
        config["vision_config"]["model_type"] = config["model_type"]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tokenizer.save_pretrained(folder)
    return folder
