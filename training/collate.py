"""From pairs to forward passes with little padding, and from their embeddings back to queries, targets, negatives."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from modeling_gve import PreparedItem


TEXTS_REMEMBERED = 200_000  # lengths of texts, which come again in the next pass over the pairs
# Fixed cost of one more forward and backward pass, in tokens: what splitting a batch by length has to save. Of the
# order of gve-mini's on a CPU; another figure costs time, never correctness.
TOKENS_A_PASS = 128


class PairBatch(NamedTuple):
    """The items of a batch, each content once.

    Attributes:
        items (list of `PreparedItem`): distinct.
        queries, targets (`torch.LongTensor` of shape `(B,)`): places in `items`.
        negatives (`torch.LongTensor` of shape `(B, N)`): places in `items`, 0 where there is none.
        negatives_valid (`torch.BoolTensor` of shape `(B, N)`): which slots hold a negative.
        contents (`torch.LongTensor` of shape `(M,)`): of each item a number that is its content's on every rank.
    """

    items: list
    queries: torch.Tensor
    targets: torch.Tensor
    negatives: torch.Tensor
    negatives_valid: torch.Tensor
    contents: torch.Tensor


class PairCollator:
    """Builds model inputs from pairs.

    Args:
        processor (`GVEProcessor`): chat layout, patches, padding.
        store ([`FrameStore`], *optional*): decoded media; every method takes another one in its place.
    """

    def __init__(self, processor, store=None):
        self.processor, self.store = processor, store
        self._text_lengths = {}

    def item(self, side, instruction=None, store=None):
        """A side as `GVEModel.encode` takes it; no instruction means the default system text."""
        store = self.store if store is None else store
        item = {"text": side.text, "instruction": instruction}
        if side.image is not None:
            item["image"] = store[side.image].frames[0]
        if side.video is not None:
            item["video"] = store[side.video]
        return {name: value for name, value in item.items() if value is not None}

    def prepare(self, side, instruction=None, store=None):
        """A side as `GVEProcessor.collate` takes it."""
        store = self.store if store is None else store
        prepared = PreparedItem(self.processor.instruction if instruction is None else instruction, side.text or "")
        if side.image is not None:
            prepared.image = store[side.image].frames[0]
        if side.video is not None:
            prepared.frames, prepared.times = store[side.video]
        return prepared

    def batch(self, pairs, negatives, num_negatives, store=None):
        """Join the sides of a batch.

        Args:
            pairs (list of [`Pair`]): B pairs.
            negatives (list of list of [`Side`]): at most N for each pair.
            num_negatives (`int`): N.
            store ([`FrameStore`], *optional*): of their media.

        Returns:
            [`PairBatch`]
        """
        places = {}
        query_places = [places.setdefault((pair.query, pair.instruction), len(places)) for pair in pairs]
        target_places = [places.setdefault((pair.target, None), len(places)) for pair in pairs]
        negative_places = torch.zeros(len(pairs), num_negatives, dtype=torch.long)
        valid = torch.zeros(len(pairs), num_negatives, dtype=torch.bool)
        for row, sides in enumerate(negatives):
            for slot, side in enumerate(sides):
                negative_places[row, slot] = places.setdefault((side, None), len(places))
                valid[row, slot] = True
        items = [self.prepare(side, instruction, store) for side, instruction in places]
        queries, targets = torch.tensor(query_places), torch.tensor(target_places)
        return PairBatch(items, queries, targets, negative_places, valid, torch.tensor(list(map(_number, places))))

    def forward_groups(self, items, micro_batch_size=None):
        """Split items into forward passes of like length.

        Args:
            items (list of `PreparedItem`): in any order.
            micro_batch_size (`int`, *optional*): most items a pass.

        Returns:
            `tuple` of a list of `BatchFeature`, one a pass, micro-batches growing in tokens, and a `torch.LongTensor`
            of shape `(len(items),)`: where each item's row stands in the concatenated outputs.
        """
        lengths = self._lengths(items)
        groups = split_by_length(lengths)
        if micro_batch_size is not None:
            groups = [
                group[start : start + micro_batch_size]
                for group in groups
                for start in range(0, len(group), micro_batch_size)
            ]
            groups.sort(key=lambda group: len(group) * lengths[group[-1]])
        features = [self.processor.collate([items[index] for index in group]) for group in groups]
        return features, torch.from_numpy(np.argsort(np.concatenate(groups)))

    def _lengths(self, items):
        """Tokens of each item, less those that all have."""
        texts = {text for item in items for text in (item.instruction, item.text)} - self._text_lengths.keys()
        if texts:
            if len(self._text_lengths) > TEXTS_REMEMBERED:
                self._text_lengths.clear()
                texts = {text for item in items for text in (item.instruction, item.text)}
            encoded = self.processor.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            self._text_lengths.update(zip(texts, map(len, encoded)))
        texts = [self._text_lengths[item.instruction] + self._text_lengths[item.text] for item in items]
        return np.array([length + self._visual_length(item) for length, item in zip(texts, items)])

    def _visual_length(self, item):
        processor, length = self.processor, 0
        for pixels, vision in ((item.image, processor.image_processor), (item.frames, processor.video_processor)):
            if pixels is not None:
                steps = -(-len(pixels) // vision.temporal_patch_size) if pixels.ndim == 4 else 1
                height, width = pixels.shape[-3:-1]
                length += steps * height * width // (vision.patch_size * vision.merge_size) ** 2
        return length


def _number(content):
    """63 bits of a hash: the same for the same side and instruction, in every process."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split_by_length(lengths, overhead=TOKENS_A_PASS):
    """Groups of like length: sort, then cut wherever the padding saved exceeds what one more pass costs.

    Args:
        lengths (`np.ndarray` of shape `(M,)`): tokens of each sequence, M >= 1.
        overhead (`float`, *optional*): cost of a pass, in tokens.

    Returns:
        list of `np.ndarray`: indices of each group; together every index once.
    """

    def cut(order):
        sizes = np.arange(1, len(order))
        saved = sizes * (lengths[order[-1]] - lengths[order[:-1]])
        if not len(saved) or saved.max() <= overhead:
            return [order]
        place = int(saved.argmax()) + 1
        return cut(order[:place]) + cut(order[place:])

    return cut(np.argsort(lengths, kind="stable"))
