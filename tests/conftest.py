"""Fixtures of all tests: tiny random backbones, a tiny tokenizer with Qwen's special tokens, a rendered video."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from rendering import draw_frames, write_video
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig

from modeling_gve import GVEConfig, GVEModel, GVEProcessor
from training.base_model import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a few merges, so that any string can be encoded."""
    texts = ["system user assistant You are a helpful assistant. a red square moves to the left"] * 9
    return train_tokenizer(texts, vocab_size=320)


@pytest.fixture(scope="session")
def backbone_config(tokenizer):
    """Qwen2.5-VL of some 50 thousand parameters; patches of 7 pixels, one windowed and one full vision layer."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 7,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


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
def gve_config(backbone_config):
    return GVEConfig(backbone_config=backbone_config.to_dict(), max_tokens_per_frame=17)


@pytest.fixture(scope="session")
def model(gve_config):
    """A random GVE model; tests do not change it."""
    torch.manual_seed(0)
    return GVEModel(gve_config).eval()


@pytest.fixture(scope="session")
def processor(gve_config, tokenizer):
    return GVEProcessor.from_config(gve_config, tokenizer)


@pytest.fixture(scope="session")
def backbone_checkpoint(backbone_config, tokenizer, tmp_path_factory):
    """Directory of a random Qwen2.5-VL with its head, and its tokenizer, as GVE starts from."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("backbone")
    Qwen2_5_VLForConditionalGeneration(backbone_config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def video_path(tmp_path_factory):
    """A real H.264 file: 24 frames of 56 x 56 at 8 frames a second."""
    return str(write_video(tmp_path_factory.mktemp("video") / "square.mp4", draw_frames(24)))
