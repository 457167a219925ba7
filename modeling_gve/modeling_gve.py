# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""GVE: a vision-language model without its head whose last attended token is the embedding (arXiv 2510.27571)."""

import copy
import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .batching_gve import collate_singles, group_singles, read_ahead, rough_length, spare_cores
from .configuration_gve import GVEConfig, check_limits
from .layers_gve import PooledPosition, batch_equal_windows, pool_in_last_layer, restore_layers, take_rows
from .processing_gve import GVEProcessor


# What encoding does faster than a plain one-by-one forward, to the same embeddings; see `GVEModel.use_shortcuts`.
SHORTCUTS = ("batching", "read_ahead", "no_mask", "vision", "last_position")
PRECISIONS = ("float32", "bfloat16", "int8", "ubinary")
# Not in the paper: tokens of a forward pass, padding included. 1,024 beat 4,096 on two CPU cores; a GPU wants more.
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
# Keys of a backbone's checkpoint and where they belong: with and without its head, before and after transformers 4.52.
CHECKPOINT_KEYS = {
    r"^(?:model\.)?(visual|language_model)\.": r"backbone.\1.",
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "backbone.language_model.",
}

logger = logging.getLogger(__name__)


@dataclass
class GVEOutput(ModelOutput):
    """Output of [`GVEModel`].

    Args:
        embeddings (`torch.FloatTensor` of shape `(B, D)`): float32, L2-normalised.
    """

    embeddings: torch.FloatTensor | None = None


class GVEModel(PreTrainedModel):
    """Embeds texts, images, videos and their combinations into one space.

    Args:
        config (`GVEConfig`): the backbone and the limits of an input.
    """

    config_class = GVEConfig
    base_model_prefix = "backbone"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: GVEConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self._processor = None
        self.post_init()
        self.use_shortcuts()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs) -> "GVEModel":
        """Load a GVE repo, or start from a backbone with its language-model head, which is never read.

        Takes GVE's own key layout and those of `Qwen2_5_VLForConditionalGeneration` and
        `Qwen3VLForConditionalGeneration`, whether saved by old or new versions of transformers, and of their
        subclasses, such as the authors' GVE-3B and GVE-7B.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): directory or Hub id.
            output_loading_info (`bool`, defaults to `False`): return also what transformers says of the keys.
            kwargs: arguments of `PreTrainedModel.from_pretrained`, and limits of [`GVEConfig`].

        Raises:
            ValueError: the checkpoint lacks weights, which the message lists, or is of another family.
        """
        kwargs.setdefault("key_mapping", CHECKPOINT_KEYS)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path}: lacks {len(missing)} weights, use a full checkpoint; "
                f"missing: {', '.join(missing)}"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the model and its code, in one key layout wherever the weights came from."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def use_shortcuts(self, names=SHORTCUTS) -> "GVEModel":
        """Take exactly these shortcuts, by default all; embeddings stay the same to rounding.

        Args:
            names (collection of `str`): of `batching` (length-sorted batches under a token budget, in `encode`),
                `read_ahead` (media decoded in threads while the model runs, in `encode`), `no_mask` (no attention mask
                where padding is on the right), `vision` (see [`batch_equal_windows`]) and `last_position` (the last
                decoder layer and the final norm run for the pooled token only).

        Raises:
            ValueError: an unknown name.
        """
        if unknown := set(names) - set(SHORTCUTS):
            raise ValueError(f"unknown shortcuts {sorted(unknown)}: use any of {', '.join(SHORTCUTS)}")
        self.shortcuts = frozenset(names)
        self._no_split_modules -= restore_layers(self.backbone)
        if "vision" in self.shortcuts:
            batch_equal_windows(self.backbone.visual)
        if "last_position" in self.shortcuts and pool_in_last_layer(self.backbone):
            self._no_split_modules.add(type(self.backbone.language_model.layers[-1]).__name__)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.FloatTensor | None = None,
        **kwargs,
    ) -> GVEOutput:
        """Embed a batch as [`GVEProcessor`] makes it, padded on either side.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): tokens, the pooled one last.
            attention_mask (`torch.LongTensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding; default 1.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): 0 text, 1 image, 2 video; by default
                told from the tokens.
            pixel_values (`torch.FloatTensor` of shape `(image_patches, C)`, *optional*): patches of all images.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*): their grids of patches.
            pixel_values_videos (`torch.FloatTensor` of shape `(video_patches, C)`, *optional*): patches of all videos.
            video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`, *optional*): their grids of patches.
            second_per_grid_ts (`torch.FloatTensor` of shape `(num_videos,)`, *optional*): seconds of a temporal patch,
                where the backbone does not read the times of frames as text.

        Raises:
            ValueError: videos came without the `second_per_grid_ts` that the backbone needs.
        """
        if not self.config.times_in_text:
            if pixel_values_videos is not None and second_per_grid_ts is None:
                raise ValueError("videos came without second_per_grid_ts: their clock is part of the input")
            kwargs["second_per_grid_ts"] = second_per_grid_ts
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if mm_token_type_ids is None:  # without them the backbone would place visual tokens as if they were text
            backbone = self.config.backbone_config
            mm_token_type_ids = (input_ids == backbone.image_token_id) + 2 * (input_ids == backbone.video_token_id)
        # Causal attention never looks at padding on the right, and is faster without a mask.
        without_mask = "no_mask" in self.shortcuts and bool((attention_mask.diff(dim=1) <= 0).all())
        last = last_attended(attention_mask)
        if isinstance(self.backbone.language_model.layers[-1], PooledPosition):
            kwargs["pooled"] = (last, attention_mask.bool()[:, None, None])
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=None if without_mask else attention_mask,
            mm_token_type_ids=mm_token_type_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        pooled = hidden[:, 0] if "pooled" in kwargs else pool_last(hidden, attention_mask)
        return GVEOutput(embeddings=nn.functional.normalize(pooled.float(), dim=-1))

    @torch.no_grad()
    def encode(
        self,
        items,
        processor: GVEProcessor | None = None,
        instruction: str | None = None,
        batch_size: int = 32,
        errors: str = "raise",
        report: list | None = None,
        show_progress_bar: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        calibration: torch.Tensor | None = None,
        num_frames: int | None = None,
        batch_tokens: int | None = None,
        decode_threads: int | None = None,
    ) -> torch.Tensor:
        """Embeddings of items.

        Args:
            items (`str`, `dict`, or sequence of them): see [`GVEProcessor`]. A list is batched by kind and length; any
                other sequence, such as a `datasets.Dataset`, is read in its own order.
            processor (`GVEProcessor`, *optional*): default the one that lies beside the model's weights.
            instruction (`str`, *optional*): system text of items that bring none.
            batch_size (`int`, defaults to 32): most items of a forward pass.
            errors (`str`, defaults to `"raise"`): `"skip"` goes on after an unreadable item, whose row becomes NaN.
            report (`list`, *optional*): gets one `{"index", "reason"}` for each skipped item.
            show_progress_bar (`bool`, defaults to `False`): show one.
            truncate_dim (`int`, *optional*): keep so many leading dimensions, L2-normalised again. The dimensions
                that a model was trained for stand in `config.matryoshka_dims`.
            precision (`str`, defaults to `"float32"`): `"bfloat16"`, `"int8"` or `"ubinary"`: see
                [`quantize_embeddings`]. Integers have no NaN: rows of skipped items are 0 and `report` is required.
            calibration (`torch.Tensor` of shape `(M, >= D)`, *optional*): float embeddings whose range `"int8"` takes.
            num_frames (`int`, *optional*): frames read from a video, instead of the processor's.
            batch_tokens (`int`, *optional*): most tokens of a forward pass, padding included, unless one item has
                more; default 1,024 on a CPU, 16,384 elsewhere.
            decode_threads (`int`, *optional*): threads that read files while the model runs; default as many as there
                are cores that the model leaves free. 0: none.

        Returns:
            `torch.Tensor` of shape `(N, D)`, on the CPU, in the order of the items: float32, bfloat16 or int8; for
            `"ubinary"` uint8 of shape `(N, D / 8)`.

        Raises:
            ValueError: an item cannot be read (with `errors="raise"`), or an argument is out of range.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f'errors={errors!r}: use "raise" or "skip"')
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: use at least 1")
        if errors == "skip" and precision in ("int8", "ubinary") and report is None:
            raise ValueError(f"precision={precision!r} cannot mark skipped rows as NaN: pass report= to learn of them")
        dim = self._checked_dim(truncate_dim)
        _check_precision(precision, dim, calibration)
        items = [items] if isinstance(items, (str, dict)) else items
        items = items if hasattr(items, "__getitem__") else list(items)
        processor = processor or self._own_processor()
        if num_frames is not None:
            patch = processor.video_processor.temporal_patch_size
            check_limits(num_frames, processor.max_tokens_per_frame, processor.max_length, patch)
            processor = copy.copy(processor)
            processor.num_frames = num_frames
        if batch_tokens is None:
            batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        order = range(len(items))
        if "batching" not in self.shortcuts:
            batch_tokens = float("inf")
        elif isinstance(items, (list, tuple)):
            order = sorted(order, key=lambda index: rough_length(items[index]))
        if decode_threads is None:
            decode_threads = spare_cores(self.device) if "read_ahead" in self.shortcuts else 0
        embeddings = torch.full((len(items), dim), float("nan"))
        skipped = {}
        training = self.training
        self.eval()
        reader = read_ahead(items, order, partial(processor.prepare, instruction=instruction), decode_threads)
        progress = tqdm(total=len(items), desc="encode", unit="item", disable=not show_progress_bar)
        try:
            singles = collate_singles(reader, processor, skipped if errors == "skip" else None)
            for indices, features in group_singles(singles, batch_size, batch_tokens):
                rows = self(**features.to(self.device)).embeddings
                embeddings[indices] = nn.functional.normalize(rows[:, :dim], dim=-1).cpu()
                progress.update(len(indices))
        finally:
            reader.close()
            progress.close()
            self.train(training)
        if report is not None:
            report.extend({"index": index, "reason": skipped[index]} for index in sorted(skipped))
        return quantize_embeddings(embeddings, precision, calibration)

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Cosines of embeddings of any precision of `encode`, of `(N, D)` and `(M, D)`: float32 of shape `(N, M)`.

        Binary vectors count as vectors of -1 and 1, so that two of them have the cosine 1 - 2 * Hamming distance / D.
        """
        return nn.functional.normalize(_floats(a), dim=-1) @ nn.functional.normalize(_floats(b), dim=-1).T

    def _checked_dim(self, truncate_dim):
        full, trained = self.config.embedding_dim, self.config.matryoshka_dims
        if truncate_dim is None:
            return full
        if not 1 <= truncate_dim <= full:
            raise ValueError(f"truncate_dim={truncate_dim}: use 1 to {full}")
        if truncate_dim not in (full, *trained):
            known = f"for {', '.join(map(str, trained))} dimensions" if trained else "without Matryoshka dimensions"
            logger.warning("truncate_dim=%d: this model was trained %s", truncate_dim, known)
        return truncate_dim

    def _own_processor(self):
        if self._processor is None:
            path = self.config.name_or_path
            if not path:
                raise ValueError("this model was not loaded from a repo: pass processor=")
            try:
                self._processor = GVEProcessor.for_model(path, self.config)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: holds no processor and no tokenizer: pass processor=") from error
        return self._processor


def last_attended(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Position of each sequence's last attended token, wherever the padding is; shape `(B,)`."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (places * (attention_mask != 0)).argmax(dim=1)


def pool_last(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hidden state of each sequence's last attended token.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, D)`): of the last layer.
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(B, D)`.
    """
    return take_rows(hidden_states, last_attended(attention_mask))


def quantize_embeddings(
    embeddings: torch.Tensor, precision: str, calibration: torch.Tensor | None = None
) -> torch.Tensor:
    """Embeddings in fewer bytes.

    `"int8"` divides by one step for all dimensions, the largest absolute value in `calibration` / 127, rounds, and
    clips what lies beyond. One step keeps inner products: a cosine errs by about step / sqrt(12) a code. (Ranges of
    their own for all dimensions, as sentence-transformers takes them, would shift inner products.) Calibrate queries
    and corpus with the same embeddings, some hundred of both. `"ubinary"` keeps the signs, eight a byte, first
    dimension in the highest bit, as sentence-transformers and FAISS pack them; it needs no calibration.

    What they cost depends on the model. With 48 rendered clips and a text on each, embedded by the base of GVE-mini
    (`tests/modeling_gve/test_precision_gve.py`): bfloat16 moved no cosine by more than 0.0005 and int8 none by more
    than 0.0025, and of each text's ten best clips both kept 99%. Binary kept 65% and moved cosines by up to 0.31: that
    is for a first stage whose finds are ranked again by floats.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): float32, L2-normalised.
        precision (`str`): `"float32"`, `"bfloat16"`, `"int8"` or `"ubinary"`.
        calibration (`torch.Tensor` of shape `(M, >= D)`, *optional*): float embeddings; `"int8"` needs them. Those of
            more dimensions are truncated to D and normalised.

    Returns:
        `torch.Tensor` of shape `(N, D)`, for `"ubinary"` `(N, D / 8)`.

    Raises:
        ValueError: an unknown precision, no calibration for int8, or D is no multiple of 8 for ubinary.
    """
    dim = embeddings.shape[1]
    _check_precision(precision, dim, calibration)
    if precision == "ubinary":
        bits = (embeddings > 0).view(len(embeddings), dim // 8, 8)
        return (bits * _BITS).sum(dim=2).to(torch.uint8)
    if precision == "int8":
        known = nn.functional.normalize(torch.as_tensor(calibration)[:, :dim].float(), dim=-1)
        step = known.abs().max() / 127
        return (embeddings / step).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    return embeddings.to(getattr(torch, precision))


_BITS = 2 ** torch.arange(7, -1, -1)


def _check_precision(precision, dim, calibration):
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: use one of {', '.join(PRECISIONS)}")
    if precision == "ubinary" and dim % 8:
        raise ValueError(f'precision="ubinary" packs eight dimensions a byte: {dim} is no multiple of 8')
    if precision == "int8" and (calibration is None or calibration.ndim != 2 or calibration.shape[1] < dim):
        given = "none" if calibration is None else f"shape {tuple(calibration.shape)}"
        raise ValueError(f'precision="int8" needs calibration= of shape (M, {dim}), float embeddings: got {given}')


def _floats(embeddings):
    if embeddings.dtype != torch.uint8:
        return embeddings.float()
    bits = (embeddings[..., None] & _BITS.to(embeddings.device)) != 0
    return bits.flatten(-2).float() * 2 - 1
