# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Configuration of GVE: a vision-language backbone and the limits under which it reads text, images and videos."""

import copy

from transformers import AutoConfig, PretrainedConfig


DEFAULT_INSTRUCTION = "You are a helpful assistant."
BACKBONES = ("qwen2_5_vl", "qwen3_vl")
LIMITS = ("num_frames", "max_tokens_per_frame", "max_length")


def _qwen2_5_vl(hidden_size, intermediate_size, layers, heads, key_value_heads, vocab_size, tied):
    """Configuration of a Qwen2.5-VL as published; all sizes share one vision tower but for its output."""
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "tokens_per_second": 2,
        },
    }


def _qwen3_vl(hidden_size, intermediate_size, layers, heads, tied, vision):
    """Configuration of a dense Qwen3-VL as published."""
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {**vision, "num_heads": 16, "out_hidden_size": hidden_size},
    }


_VISION_300M = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_VISION_500M = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
PRESETS = {
    "gve-3b": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
    "gve-7b": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "qwen3-vl-2b": _qwen3_vl(2048, 6144, 28, 16, tied=True, vision=_VISION_300M),
    "qwen3-vl-4b": _qwen3_vl(2560, 9728, 36, 32, tied=True, vision=_VISION_300M),
    "qwen3-vl-8b": _qwen3_vl(4096, 12288, 36, 32, tied=False, vision=_VISION_500M),
}


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
            (Qwen2.5-VL or Qwen3-VL), by default that of `Qwen2_5_VLConfig()`.
        num_frames (`int`, defaults to 8): frames read from a video, a multiple of the backbone's temporal patch size.
        max_tokens_per_frame (`int`, defaults to 200): a frame or an image gets strictly fewer visual tokens than this
            (arXiv 2510.27571, evaluation protocol).
        max_length (`int`, defaults to 8192): most tokens an input may have; only text is ever cut to fit.
        instruction (`str`, *optional*): system text of an input that brings none.
        matryoshka_dims (list of `int`, *optional*): numbers of leading dimensions that the model was trained to embed
            with on their own; empty for a model without them.

    `from_pretrained` reads a backbone's configuration too, as the start of a new GVE model.

    Raises:
        ValueError: a limit or a number of dimensions is out of range, or the backbone is of another family.
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
        if backbone_config.model_type not in BACKBONES:
            raise ValueError(f"backbone of type {backbone_config.model_type!r}: use one of {', '.join(BACKBONES)}")
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

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "GVEConfig":
        """Configuration of a published checkpoint, without network.

        Args:
            name (`str`): `"gve-3b"` or `"gve-7b"` (arXiv 2510.27571), or a body to start from: `"qwen3-vl-2b"`,
                `"qwen3-vl-4b"`, `"qwen3-vl-8b"`.
            kwargs: further arguments of [`GVEConfig`].

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: use one of {', '.join(PRESETS)}")
        return cls(backbone_config=copy.deepcopy(PRESETS[name]), **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") in BACKBONES:
            dtype = config.get("dtype") or config.get("torch_dtype")  # as it was called before transformers 4.56
            # Code that the backbone's repo brings would otherwise be named, and asked for, by the model made of it.
            backbone = {key: value for key, value in config.items() if key not in ("architectures", "auto_map")}
            config = {"model_type": cls.model_type, "backbone_config": backbone, "dtype": dtype}
        elif config.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: holds a model of type {config.get('model_type')!r}: "
                f"use a GVE repo or a checkpoint of one of {', '.join(BACKBONES)}"
            )
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Transformers would set these after the checks of `__init__`.
        limits = {name: kwargs.pop(name) for name in LIMITS if name in kwargs}
        return super().from_dict({**config_dict, **limits}, **kwargs)

    @property
    def times_in_text(self) -> bool:
        """Whether the backbone reads the times of frames as text (Qwen3-VL) or from position ids (Qwen2.5-VL)."""
        return self.backbone_config.model_type == "qwen3_vl"

    @property
    def embedding_dim(self) -> int:
        """Dimensions of an embedding: the hidden size of the backbone's language model."""
        return self.get_text_config().hidden_size

    def get_text_config(self, *args, **kwargs) -> PretrainedConfig:
        return self.backbone_config.get_text_config(*args, **kwargs)
