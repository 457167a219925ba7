"""Clips, reference embeddings, and checkpoints of a backbone in every key layout."""

import json

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from rendering import draw_frames
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from modeling_gve import VideoFrames


FULL_MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}


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
