# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Layers of Qwen2.5-VL and Qwen3-VL that give transformers' results, to rounding, in less time, with its weights."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextDecoderLayer,
    Qwen3VLVisionAttention,
    Qwen3VLVisionPatchEmbed,
)
from transformers.utils.generic import is_flash_attention_requested


def take_rows(tensor, places):
    """`tensor[b, places[b]]` for each b."""
    places = places.to(tensor.device)  # another one under a device map
    return tensor[torch.arange(len(places), device=tensor.device), places]


class PooledPosition:
    """Decoder layer whose output is wanted at one position a sequence: mixin in front of transformers' layer.

    Keys and values are computed for all positions; query, output projection and feed-forward network for one. Without
    the argument `pooled` the layer is transformers' own.
    """

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, pooled=None, **kwargs):
        """`pooled`: positions `(B,)` and attended keys, `bool` of shape `(B, 1, 1, S)`; returns `(B, 1, D)`."""
        if pooled is None:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        places, attended = pooled
        attention = self.self_attn
        inputs = self.input_layernorm(hidden_states)
        query, key = self._query(take_rows(inputs, places)[:, None]), self._key(inputs)
        cos, sin = (x[:, :, None] for x in position_embeddings)
        query = query * take_rows(cos, places)[:, None] + rotate_half(query) * take_rows(sin, places)[:, None]
        key = key * cos + rotate_half(key) * sin
        value = attention.v_proj(inputs).unflatten(-1, (-1, attention.head_dim))
        # One query a head: those that share a key head become its queries.
        query = query.squeeze(1).unflatten(1, (-1, attention.num_key_value_groups))
        found = nn.functional.scaled_dot_product_attention(
            query,
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attended,
            dropout_p=attention.attention_dropout if self.training else 0.0,
            scale=attention.scaling,
        )
        hidden = take_rows(hidden_states, places)[:, None] + attention.o_proj(found.flatten(1)[:, None])
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _query(self, inputs):
        return self.self_attn.q_proj(inputs).unflatten(-1, (-1, self.self_attn.head_dim))

    def _key(self, inputs):
        return self.self_attn.k_proj(inputs).unflatten(-1, (-1, self.self_attn.head_dim))


class GVEDecoderLayer(PooledPosition, Qwen2_5_VLDecoderLayer):
    """Last layer of Qwen2.5-VL."""


class GVEQwen3DecoderLayer(PooledPosition, Qwen3VLTextDecoderLayer):
    """Last layer of Qwen3-VL, which normalises queries and keys."""

    def _query(self, inputs):
        return self.self_attn.q_norm(super()._query(inputs))

    def _key(self, inputs):
        return self.self_attn.k_norm(super()._key(inputs))


def pool_in_last_layer(backbone: nn.Module) -> bool:
    """Let the language model's last layer accept `pooled` where it can: see [`PooledPosition`].

    The state dict stays the same: only the class of the layer changes.

    Args:
        backbone (`nn.Module`): transformers' Qwen2.5-VL or Qwen3-VL body, changed in place.

    Returns:
        `bool`: whether the layer accepts it. A layer with a sliding window does not, nor one behind which Qwen3-VL
        adds visual features.
    """
    layers = backbone.language_model.layers
    if type(layers[-1]) is Qwen2_5_VLDecoderLayer and layers[-1].self_attn.sliding_window is None:
        layers[-1].__class__ = GVEDecoderLayer
    elif type(layers[-1]) is Qwen3VLTextDecoderLayer and len(layers) > len(backbone.visual.deepstack_visual_indexes):
        layers[-1].__class__ = GVEQwen3DecoderLayer
    return isinstance(layers[-1], PooledPosition)


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


def restore_layers(backbone: nn.Module) -> set:
    """Give back transformers' own classes to the modules that have one of this file; returns those classes' names."""
    names = set()
    for module in backbone.modules():
        if type(module).__module__ == __name__:
            names.add(type(module).__name__)
            module.__class__ = type(module).__bases__[-1]
    return names
