# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""GVE: a vision-language model without its head whose last attended token is the embedding (arXiv 2510.27571)."""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention, Qwen3VLVisionPatchEmbed
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested

from .configuration_gve import GVEConfig
from .processing_gve import GVEProcessor


# Keys of a backbone's checkpoint and where they belong: with and without its head, before and after transformers 4.52.
CHECKPOINT_KEYS = {
    r"^(?:model\.)?(visual|language_model)\.": r"backbone.\1.",
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "backbone.language_model.",
}


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
        batch_equal_windows(self.backbone.visual)
        self._processor = None
        self.post_init()

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
        right_padded = bool((attention_mask.diff(dim=1) <= 0).all())
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=None if right_padded else attention_mask,
            mm_token_type_ids=mm_token_type_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        return GVEOutput(embeddings=nn.functional.normalize(pool_last(hidden, attention_mask).float(), dim=-1))

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
    ) -> torch.FloatTensor:
        """Embeddings of items.

        Args:
            items (`str`, `dict`, or sequence of them): see [`GVEProcessor`]. A list is batched by kind and length; any
                other sequence, such as a `datasets.Dataset`, is read in its own order.
            processor (`GVEProcessor`, *optional*): default the one that lies beside the model's weights.
            instruction (`str`, *optional*): system text of items that bring none.
            batch_size (`int`, defaults to 32): items a forward pass.
            errors (`str`, defaults to `"raise"`): `"skip"` goes on after an unreadable item, whose row becomes NaN.
            report (`list`, *optional*): gets one `{"index", "reason"}` for each skipped item.
            show_progress_bar (`bool`, defaults to `False`): show one.

        Returns:
            `torch.FloatTensor` of shape `(N, D)`: float32, on the CPU, in the order of the items.

        Raises:
            ValueError: an item cannot be read (with `errors="raise"`), or an argument is out of range.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f'errors={errors!r}: use "raise" or "skip"')
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use at least 1")
        items = [items] if isinstance(items, (str, dict)) else items
        items = items if hasattr(items, "__getitem__") else list(items)
        processor = processor or self._own_processor()
        order = range(len(items))
        if isinstance(items, (list, tuple)):
            order = sorted(order, key=lambda index: _rough_length(items[index]))
        embeddings = torch.full((len(items), self.config.embedding_dim), float("nan"))
        skipped = {}
        training = self.training
        self.eval()
        try:
            starts = range(0, len(items), batch_size)
            for start in tqdm(starts, desc="encode", unit="batch", disable=not show_progress_bar):
                batch = {}
                for index in order[start : start + batch_size]:
                    try:
                        batch[index] = processor.prepare(items[index], instruction)
                    except ValueError as error:
                        if errors == "raise":
                            error.args = (f"item {index}: {error}",)
                            raise
                        skipped[index] = str(error)
                if batch:
                    features = processor.collate(list(batch.values())).to(self.device)
                    embeddings[list(batch)] = self(**features).embeddings.cpu()
        finally:
            self.train(training)
        if report is not None:
            report.extend({"index": index, "reason": skipped[index]} for index in sorted(skipped))
        return embeddings

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Cosines of embeddings of shapes `(N, D)` and `(M, D)`, shape `(N, M)`."""
        return nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T

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


def pool_last(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hidden state of each sequence's last attended token, wherever the padding is.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, D)`): of the last layer.
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(B, D)`.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (places * (attention_mask != 0)).argmax(dim=1)
    return hidden_states[torch.arange(len(last), device=last.device), last]


def _rough_length(item):
    """Sorting key that keeps items of one kind and length together, so that little is padded."""
    item = item if isinstance(item, dict) else {"text": item}
    return item.get("video") is not None, item.get("image") is not None, len(str(item.get("text") or ""))


class _LinearPatches:
    """Patch embedding as one matrix product: a convolution whose stride is its kernel is a linear map of patches."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        patches = hidden_states.to(weight.dtype).view(-1, weight[0].numel())
        return nn.functional.linear(patches, weight.flatten(1), self.proj.bias)


class _EqualWindows:
    """Vision attention that runs all windows of one length in one call instead of one call a window."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
        if is_flash_attention_requested(self.config):  # flash attention takes the packed windows as they are
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        length = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).view(length, 3, self.num_heads, self.head_dim).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        starts = cu_seqlens.tolist()
        sizes = {end - start for start, end in zip(starts, starts[1:])}
        if len(sizes) == 1:
            output = self._attend(query, key, value, sizes.pop(), **kwargs)
        else:
            output = self._attend_by_size(query, key, value, cu_seqlens, sizes, **kwargs)
        return self.proj(output.reshape(length, -1))

    def _attend(self, query, key, value, size, **kwargs):
        """Attention inside consecutive windows of `size` rows; tensors `(windows * size, heads, head_dim)`."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        windows = [x.view(-1, size, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
        dropout = self.attention_dropout if self.training else 0.0
        scaling = self.scaling
        output, _ = attention(
            self, *windows, attention_mask=None, scaling=scaling, dropout=dropout, is_causal=False, **kwargs
        )
        return output.reshape(query.shape)

    def _attend_by_size(self, query, key, value, cu_seqlens, sizes, **kwargs):
        """Same, for windows of several sizes: gather the rows of each size, attend, put them back."""
        boundaries = cu_seqlens.to(query.device).long()
        row_sizes = boundaries.diff().repeat_interleave(boundaries.diff())
        rows = [(row_sizes == size).nonzero().squeeze(1) for size in sizes]
        outputs = [
            self._attend(query[index], key[index], value[index], size, **kwargs) for index, size in zip(rows, sizes)
        ]
        return torch.cat(outputs)[torch.cat(rows).argsort()]


class GVEPatchEmbed(_LinearPatches, Qwen2_5_VisionPatchEmbed):
    """Patch embedding of Qwen2.5-VL."""


class GVEVisionAttention(_EqualWindows, Qwen2_5_VLVisionAttention):
    """Vision attention of Qwen2.5-VL, whose layers attend in windows or in frames."""


class GVEQwen3PatchEmbed(_LinearPatches, Qwen3VLVisionPatchEmbed):
    """Patch embedding of Qwen3-VL."""


class GVEQwen3VisionAttention(_EqualWindows, Qwen3VLVisionAttention):
    """Vision attention of Qwen3-VL, whose layers all attend in frames."""


_FAST_CLASSES = {
    Qwen2_5_VisionPatchEmbed: GVEPatchEmbed,
    Qwen2_5_VLVisionAttention: GVEVisionAttention,
    Qwen3VLVisionPatchEmbed: GVEQwen3PatchEmbed,
    Qwen3VLVisionAttention: GVEQwen3VisionAttention,
}


def batch_equal_windows(visual: nn.Module) -> nn.Module:
    """Make the vision tower of a Qwen2.5-VL or Qwen3-VL fast where attention is not packed by a flash kernel.

    Results and gradients stay the same (to rounding), and so does the state dict: only the classes of the patch
    embedding and of the attention modules change.

    Args:
        visual (`nn.Module`): transformers' vision tower, changed in place. Repeated calls do nothing.

    Returns:
        `nn.Module`: the same tower.
    """
    for module in visual.modules():
        module.__class__ = _FAST_CLASSES.get(type(module), type(module))
    return visual
