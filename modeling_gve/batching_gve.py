# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""From items to batches for encoding: read ahead, ordered by length, padded little."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn
from transformers import BatchFeature


MAX_DECODE_THREADS = 8


def rough_length(item):
    """Sorting key that keeps items of one kind and length together, so that little is padded."""
    item = item if isinstance(item, dict) else {"text": item}
    texts = (item.get("text"), item.get("instruction"))
    return item.get("video") is not None, item.get("image") is not None, sum(len(str(text or "")) for text in texts)


def spare_cores(device):
    """Cores that the model's own threads leave free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = torch.get_num_threads() if device.type == "cpu" else 1
    return min(max(cores - busy, 0), MAX_DECODE_THREADS)


def read_ahead(items, order, prepare, threads):
    """Yields `(index, call)`, where `call()` is `prepare(items[index])`, started some items before it is asked for."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        waiting = deque()
        try:
            for index in order:
                waiting.append((index, _reading(items, index, prepare, pool if threads else None)))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _reading(items, index, prepare, pool):
    try:
        item = items[index]
    except (OSError, RuntimeError, ValueError) as error:  # a datasets.Dataset decodes here
        return partial(_fail, " ".join(str(error).split())[:160] or type(error).__name__)
    if pool is not None and isinstance(item, dict) and all(_is_shareable(item.get(key)) for key in ("image", "video")):
        return pool.submit(prepare, item).result
    return partial(prepare, item)


def _is_shareable(medium):
    """Whether threads may read it at once: an opened file or a decoder may stand in two items."""
    return medium is None or isinstance(medium, (str, os.PathLike, bytes, dict))


def _fail(reason):
    raise ValueError(reason)


def collate_singles(reader, processor, skipped):
    """Yields `(index, features)` of each item alone; keeps the reasons of bad ones in `skipped`, or raises."""
    for index, read in reader:
        try:
            yield index, processor.collate([read()])
        except ValueError as error:
            if skipped is None:
                error.args = (f"item {index}: {error}",)
                raise
            skipped[index] = str(error)


def group_singles(singles, batch_size, batch_tokens):
    """Yields `(indices, features)` of batches under both limits."""
    indices, rows, longest = [], [], 0
    for index, features in singles:
        longest = max(longest, features["input_ids"].shape[1])
        if rows and (len(rows) == batch_size or (len(rows) + 1) * longest > batch_tokens):
            yield indices, _join(rows)
            indices, rows, longest = [], [], features["input_ids"].shape[1]
        indices.append(index)
        rows.append(features)
    if rows:
        yield indices, _join(rows)


def _join(rows):
    """One batch, padded on the right, of batches of one item."""
    if len(rows) == 1:
        return rows[0]
    longest = max(row["input_ids"].shape[1] for row in rows)
    end = int(rows[0]["input_ids"][0, -1])
    joined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            fill = end if name == "input_ids" else 0
            parts = [nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        joined[name] = torch.cat(parts)
    return BatchFeature(joined)
