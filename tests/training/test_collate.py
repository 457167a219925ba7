"""Forward groups and the way back to queries, targets and negatives."""

import numpy as np
import pytest
import torch
from tiny_pairs import noise_video

from training.collate import PairCollator, split_by_length
from training.pairs import FrameStore, Pair, Side


def test_split_by_length_cuts_where_padding_costs_more_than_a_pass():
    lengths = np.array([50, 10, 52, 10, 11])
    assert [group.tolist() for group in split_by_length(lengths, overhead=100)] == [[1, 3, 4], [0, 2]]
    assert [sorted(group.tolist()) for group in split_by_length(lengths, overhead=1000)] == [[0, 1, 2, 3, 4]]
    assert [group.tolist() for group in split_by_length(np.array([7]))] == [[0]]


def test_every_index_lies_in_one_group():
    lengths = np.random.default_rng(0).integers(5, 400, 97)
    groups = split_by_length(lengths, overhead=50)
    assert sorted(np.concatenate(groups).tolist()) == list(range(97))
    assert len(groups) > 3


@pytest.fixture
def collator(tmp_path, processor):
    store = FrameStore(tmp_path, processor)
    store.put([("video", noise_video(seed)) for seed in range(3)])
    store.seal()
    return PairCollator(processor, store)


def test_embeddings_come_back_in_order(collator, model):
    videos = sorted(collator.store._entries)
    sides = [
        Side("short"),
        Side(None, None, videos[0]),
        Side("a text that is very much longer " * 40),
        Side("x", None, videos[1]),
    ]
    items = [collator.prepare(side, "Find it." if index % 2 else None) for index, side in enumerate(sides)]
    groups, places = collator.forward_groups(items)
    assert len(groups) > 1
    with torch.no_grad():
        together = torch.cat([model(**group).embeddings for group in groups])[places]
        alone = torch.cat([model(**collator.processor.collate([item])).embeddings for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_each_content_of_a_batch_is_embedded_once(collator):
    video = sorted(collator.store._entries)[0]
    shared, other = Side(None, None, video), Side("other")
    pairs = [Pair(Side("a"), shared, (), "Find it.", None), Pair(Side("b"), other, (), None, None)]
    batch = collator.batch(pairs, [[other, Side("c")], [shared]], num_negatives=2)
    assert len(batch.items) == 5
    assert batch.negatives_valid.tolist() == [[True, True], [True, False]]
    assert batch.negatives[0, 0] == batch.targets[1]
    assert batch.negatives[1, 0] == batch.targets[0]
    assert [batch.items[place].instruction for place in batch.queries] == ["Find it.", "You are a helpful assistant."]
    assert batch.items[batch.targets[0]].frames.shape == (8, 56, 56, 3)
    assert collator.batch(pairs, [[], []], num_negatives=0).negatives.shape == (2, 0)
