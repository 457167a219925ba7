"""Sweeps: combinations, fewer dimensions, lower precision, storage, and messages."""

import numpy as np
import pytest

from evaluate_metrics.retrieval_data import UvrbError
from evaluate_metrics.settings import Setting, bytes_per_vector, reduce_embeddings, sweep
from evaluate_metrics.uvrb_retrieval.ranking import top_k


@pytest.fixture
def embeddings():
    rows = np.random.default_rng(0).standard_normal((40, 24), dtype=np.float32)
    rows[3] = np.nan
    return rows


def test_all_combinations_in_order_and_no_setting_twice():
    settings = sweep(num_frames=[8, 16], precision=["int8", "float32", "int8"])
    assert settings == [Setting(8, precision="int8"), Setting(8), Setting(16, precision="int8"), Setting(16)]
    assert sweep() == [Setting()] and Setting().changes == {} == Setting().limits
    assert Setting(8, None, 64, "int8").changes == {"num_frames": 8, "truncate_dim": 64, "precision": "int8"}
    assert Setting(8, 100, 64).limits == {"num_frames": 8, "max_tokens_per_frame": 100}


def test_signs_order_as_the_hamming_distance_of_packed_bits(embeddings):
    signs = reduce_embeddings(embeddings, Setting(precision="ubinary"))
    bits = np.packbits(embeddings > 0, axis=1)
    assert bits.shape[1] == bytes_per_vector(24, Setting(precision="ubinary"))
    distance = np.unpackbits(bits[:, None] ^ bits[None], axis=2).sum(axis=2).astype(float)
    distance[:, 3] = np.inf
    known = np.delete(np.arange(40), 3)
    expected = np.argsort(distance[known], axis=1, kind="stable")[:, :39]
    assert top_k(signs[known], signs, 39)[0].tolist() == expected.tolist()


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.99999), ("int8", 0.9998), ("ubinary", 0.6)])
def test_what_a_lower_precision_costs(embeddings, precision, least):
    """Cosine of each vector with its reduced self; a vector that is missing stays without a cosine."""
    reduced = reduce_embeddings(embeddings, Setting(precision=precision)).astype(np.float64)
    cosines = (embeddings * reduced).sum(1) / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(reduced, axis=1)
    known = np.delete(np.arange(40), 3)
    assert least < cosines[known].min() and (precision == "ubinary" or cosines[known].max() < 1 - 1e-9)
    assert not np.isfinite(reduced[3]).all() or not reduced[3].any()


def test_fewer_dimensions_are_the_leading_ones(embeddings):
    assert (reduce_embeddings(embeddings[:3], Setting(truncate_dim=5)) == embeddings[:3, :5]).all()
    with pytest.raises(UvrbError, match="truncate_dim is 25; the model's vectors have 24"):
        reduce_embeddings(embeddings, Setting(truncate_dim=25))


@pytest.mark.parametrize("name", ["num_frames", "max_tokens_per_frame", "truncate_dim"])
def test_values_are_checked(name):
    with pytest.raises(UvrbError, match=f"{name} is 0; give whole numbers from 1"):
        Setting(**{name: 0})
    with pytest.raises(UvrbError, match="precision is 'int4'; choose float32, bfloat16, int8, ubinary"):
        Setting(precision="int4")
