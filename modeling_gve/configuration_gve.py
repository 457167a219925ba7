# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Configuration of GVE: a vision-language backbone and the limits under which it reads text, images and videos."""

import copy

from transformers import AutoConfig, PretrainedConfig


DEFAULT_INSTRUCTION = "You are a helpful assistant."


def check_limits(num_frames: int, max_tokens_per_frame: int, max_length: int, temporal_patch_size: int = 2) -> None:
    """Check the limits that configuration and processor share.

    Raises:
        ValueError: a limit is out of range; the message names it and says what is possible.
    """
    if num_frames < 1 or num_frames % temporal_patch_size:
        raise ValueError(f"num_frames={num_frames}: use a positive multiple of {temporal_patch_size}")
    # Below 9, rounding up to whole tokens can exceed the limit while a small image is enlarged to four tokens.
    if max_tokens_per_frame < 9:
        raise ValueError(f"max_tokens_per_frame={max_tokens_per_frame}: use at least 9")
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: use a positive number of tokens")


class GVEConfig(PretrainedConfig):
    """Configuration of [`GVEModel`].

    Args:
        backbone_config (`dict` or `PretrainedConfig`, *optional*): configuration of the vision-language backbone
            (Qwen2.5-VL), by default that of `Qwen2_5_VLConfig()`.
        num_frames (`int`, defaults to 8): frames read from a video, a multiple of the backbone's temporal patch size.
        max_tokens_per_frame (`int`, defaults to 200): a frame or an image gets strictly fewer visual tokens than this
            (arXiv 2510.27571, evaluation protocol).
        max_length (`int`, defaults to 8192): most tokens an input may have; only text is ever cut to fit.
        instruction (`str`, *optional*): system text of an input that brings none.
        matryoshka_dims (list of `int`, *optional*): numbers of leading dimensions that the model was trained to embed
            with on their own; empty for a model without them.

    Raises:
        ValueError: a limit is out of range, or a number of dimensions.
    """

    model_type = "gve"
    sub_configs = {"backbone_config": AutoConfig}
    max_length: int = 8192  # declared: transformers would take it for a setting of generation and refuse to save it

    def __init__(
        self,
        backbone_config=None,
        num_frames: int = 8,
        max_tokens_per_frame: int = 200,
        max_length: int = 8192,
        instruction: str = DEFAULT_INSTRUCTION,
        matryoshka_dims: list[int] | None = None,
        **kwargs,
    ):
        if isinstance(backbone_config, PretrainedConfig):
            # A copy: a new parent resets its children's attention, which would turn a living model's causal mask off.
            backbone_config = copy.deepcopy(backbone_config)
        else:
            backbone_config = AutoConfig.for_model(**{"model_type": "qwen2_5_vl", **(backbone_config or {})})
        temporal_patch_size = backbone_config.vision_config.temporal_patch_size
        check_limits(num_frames, max_tokens_per_frame, max_length, temporal_patch_size)
        self.backbone_config = backbone_config
        self.num_frames = num_frames
        self.max_tokens_per_frame = max_tokens_per_frame
        self.max_length = max_length
        self.instruction = instruction
        self.matryoshka_dims = sorted(matryoshka_dims or [], reverse=True)
        if any(not 1 <= dim <= self.embedding_dim for dim in self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims={self.matryoshka_dims}: use dimensions from 1 to {self.embedding_dim}")
        super().__init__(**kwargs)

    @property
    def embedding_dim(self) -> int:
        """Dimensions of an embedding: the hidden size of the backbone's language model."""
        return self.get_text_config().hidden_size

    def get_text_config(self, *args, **kwargs) -> PretrainedConfig:
        return self.backbone_config.get_text_config(*args, **kwargs)
