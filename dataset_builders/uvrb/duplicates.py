"""Near-duplicate videos by perceptual hash, within a corpus and between queries and corpus."""

import numpy as np
from PIL import Image


SIDE, KEPT = 32, 8  # a frame is reduced to 32 x 32, of whose transform the 8 x 8 lowest frequencies count
FRAME_BITS = 3 * KEPT * KEPT
# Not in the paper: two videos are near-duplicates if at most this share of their bits differs.
MAX_SHARE = 0.06
BLOCK = 1024

_k, _n = np.mgrid[0:SIDE, 0:SIDE]
_TRANSFORM = np.cos(np.pi * _k * (2 * _n + 1) / (2 * SIDE))


def frame_hashes(frames):
    """Perceptual hash of each frame: signs of the low frequencies of its three channels against their median.

    Args:
        frames (`np.ndarray` of shape `(T, H, W, 3)`): uint8 RGB.

    Returns:
        list of T `str`: hex, 192 bits each.
    """
    hashes = []
    for frame in frames:
        small = np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
        spectrum = _TRANSFORM @ small.transpose(2, 0, 1) @ _TRANSFORM.T
        low = spectrum[:, :KEPT, :KEPT].reshape(3, -1)
        # Rounded, so that the noise of an empty picture does not look like a pattern.
        signs = np.round(low) > np.round(np.median(low, axis=1, keepdims=True))
        hashes.append(np.packbits(signs).tobytes().hex())
    return hashes


def unpack(hashes, num_frames):
    """Hashes of a video as `(num_frames * 192,)` of -1 and 1; a shorter video repeats frames as decoding does."""
    rows = np.stack([np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) for text in hashes])
    chosen = np.linspace(0, len(rows) - 1, num_frames).round().astype(int)
    return rows[chosen].reshape(-1).astype(np.float32) * 2 - 1


def within(ids, vectors):
    """Pairs of ids whose vectors are near-duplicates, each pair once, in the order of the ids."""
    pairs = []
    for start in range(0, len(vectors), BLOCK):
        share = _share(vectors[start : start + BLOCK], vectors)
        for row, column in np.argwhere(share <= MAX_SHARE):
            if start + row < column:
                pairs.append((ids[start + row], ids[column]))
    return pairs


def between(query_ids, query_vectors, corpus_ids, corpus_vectors):
    """Pairs of a query and a video; a query of one frame is held against each frame of a video."""
    pairs = []
    for name, vector in zip(query_ids, query_vectors):
        rows = corpus_vectors.reshape(len(corpus_vectors), -1, len(vector))
        nearest = ((len(vector) - rows @ vector) / 2 / len(vector)).min(axis=1)
        pairs += [(name, corpus_ids[column]) for column in np.flatnonzero(nearest <= MAX_SHARE)]
    return pairs


def _share(left, right):
    return (left.shape[1] - left @ right.T) / 2 / left.shape[1]
