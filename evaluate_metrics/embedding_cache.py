"""Embeds items over one or several processes, with a cache by content: nothing is embedded twice."""

import hashlib
import json
import os

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object


CHUNK_BATCHES = 2  # batches that are embedded, and stored, at once: what a kill can cost one process


def embed(encoder, side, instruction, cache_folder, accelerator, progress):
    """Embeddings of one side of a dataset.

    The side is cut into chunks, of similar lengths and always the same, whatever the number of processes; each chunk
    is a file of the cache under the hash of model, limits, instruction and content. So datasets that share a corpus
    embed it once, and a run that was killed goes on with the chunk where it stopped.

    Args:
        encoder: what embeds, one of `encoders.py`.
        side (`Side`): N items.
        instruction (`str` or `None`): for all of them.
        cache_folder (`Path`): where the main process keeps embeddings.
        accelerator (`accelerate.Accelerator`): the R processes; each takes every R-th missing chunk.
        progress (`tqdm.tqdm`): advances by N.

    Returns:
        `(numpy.ndarray of shape (N, D), list of {"index", "reason"})` on the main process, `None` on the others.
    """
    done = progress.n + len(side)
    chunks = _chunks(side, CHUNK_BATCHES * encoder.batch_size)
    paths = [cache_folder / f"{_key(encoder, side, instruction, chunk)}.npz" for chunk in chunks]
    missing = [place for place, path in enumerate(paths) if accelerator.is_main_process and not path.is_file()]
    (missing,) = broadcast_object_list([missing])
    for start in range(0, len(missing), accelerator.num_processes):
        mine = missing[start:][accelerator.process_index : accelerator.process_index + 1]
        for place, embeddings, skipped in gather_object(
            [_embed(encoder, side, instruction, i, chunks[i]) for i in mine]
        ):
            if accelerator.is_main_process:
                _write(paths[place], embeddings, skipped)
            progress.update(len(chunks[place]))
    progress.update(done - progress.n)
    return _assemble(chunks, paths) if accelerator.is_main_process else None


def write_atomically(path, write):
    """Calls `write(file)` on a temporary binary file beside `path`, then renames it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def _chunks(side, size):
    """Rows in the order of their text's length, so that little is padded; without text in their own order."""
    order = np.argsort(side.text_lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def _key(encoder, side, instruction, chunk):
    content = [encoder.fingerprint, encoder.limits, instruction, [side.digests[row] for row in chunk]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _embed(encoder, side, instruction, place, chunk):
    report = []
    embeddings = np.asarray(encoder.encode(list(side.items(chunk)), instruction, report), dtype=np.float32)
    return place, embeddings, [{"index": int(entry["index"]), "reason": str(entry["reason"])} for entry in report]


def _write(path, embeddings, skipped):
    write_atomically(path, lambda file: np.savez(file, embeddings=embeddings, skipped=json.dumps(skipped)))


def _assemble(chunks, paths):
    embeddings, skipped = None, []
    for chunk, path in zip(chunks, paths):
        with np.load(path) as stored:
            if embeddings is None:
                embeddings = np.empty((sum(map(len, chunks)), stored["embeddings"].shape[1]), dtype=np.float32)
            embeddings[chunk] = stored["embeddings"]
            skipped += [{**entry, "index": int(chunk[entry["index"]])} for entry in json.loads(str(stored["skipped"]))]
    return embeddings, sorted(skipped, key=lambda entry: entry["index"])
