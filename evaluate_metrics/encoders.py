"""What turns items into vectors for the runner, over one or several processes and with a cache by content."""

import gc
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import snapshot_download
from transformers import AutoImageProcessor, AutoModel, PretrainedConfig

from evaluate_metrics.retrieval_data import UvrbError, digest_item
from modeling_gve import GVEModel


BACKBONES = ("qwen2_5_vl", "qwen3_vl")
CHUNK_BATCHES = 8  # batches handed to `encode` at once, so that it can sort by length and memory stays bounded
MODEL_FILES = (".json", ".safetensors", ".bin", ".py", ".jinja", ".txt", ".model")


class GVEEncoder:
    """A model repo with an `encode` method, or a backbone before it becomes GVE, loaded when it is first needed.

    Args:
        name (`str`): what tables call it.
        path (`str`): a folder, or a model repo of the Hub. Its code is run (`trust_remote_code`).
        device (`torch.device`): where it runs.
        dtype (`str`): of the weights, as `from_pretrained` takes it.
        batch_size (`int`): passed to `encode`.

    Raises:
        UvrbError: nothing there to load.
    """

    def __init__(self, name, path, device, dtype="auto", batch_size=32):
        self.name = name
        self.path = path
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.folder = _model_folder(path)
        self.fingerprint = f"{fingerprint_folder(self.folder)}-{dtype}"
        self._model = None

    def encode(self, items, instruction, skipped):
        """Embeddings of `items`, float32 of shape `(N, D)`; broken items become NaN rows, appended to `skipped`."""
        if self._model is None:
            self._model = self._load()
        embeddings = self._model.encode(
            items, instruction=instruction, batch_size=self.batch_size, errors="skip", report=skipped
        )
        return embeddings.float().cpu().numpy()

    def release(self):
        """Frees the model's memory."""
        self._model = None
        gc.collect()

    def _load(self):
        try:
            if PretrainedConfig.get_config_dict(self.folder)[0].get("model_type") in BACKBONES:
                model = GVEModel.from_pretrained(str(self.folder), dtype=self.dtype, **frame_limit(self.folder))
            else:
                model = AutoModel.from_pretrained(self.folder, trust_remote_code=True, dtype=self.dtype)
        except (OSError, ValueError) as error:
            raise UvrbError(f"Cannot load the model at {self.path}: {str(error).partition(chr(10))[0]}") from error
        if not hasattr(model, "encode"):
            raise UvrbError(f"The model at {self.path} is a {type(model).__name__} without `encode`; give a GVE repo.")
        return model.to(self.device).eval()


def frame_limit(folder):
    """`max_tokens_per_frame` for a backbone whose own image processor allows less than the protocol's 200."""
    processor = AutoImageProcessor.from_pretrained(folder)
    tokens = processor.size["longest_edge"] // (processor.patch_size * processor.merge_size) ** 2
    return {"max_tokens_per_frame": min(200, tokens + 1)}


class RandomEncoder:
    """Random directions that depend on the item's content only: the floor that a trained model must leave."""

    name = "random"
    path = "random"
    fingerprint = "random-64"
    batch_size = 32

    def encode(self, items, instruction, skipped):
        """Normal vectors of shape `(N, 64)`."""
        seeds = (int(digest_item(item)[:16], 16) for item in items)
        return np.stack([np.random.default_rng(seed).standard_normal(64, dtype=np.float32) for seed in seeds])

    def release(self):
        """Nothing to free."""


def embed(encoder, side, instruction, cache_folder, accelerator, progress):
    """Embeddings of one side of a dataset, from the cache or shared over the processes.

    The cache is keyed by model, instruction and the content of all items, so datasets that share a corpus embed it
    once, and a run that was killed goes on where it stopped.

    Args:
        encoder (`GVEEncoder` or `RandomEncoder`): what embeds.
        side (`Side`): N items.
        instruction (`str` or `None`): for all of them.
        cache_folder (`Path`): where the main process keeps embeddings.
        accelerator (`accelerate.Accelerator`): the processes; each takes every R-th item.
        progress (`tqdm.tqdm`): advances by N.

    Returns:
        `(numpy.ndarray of shape (N, D), list of {"index", "reason"})` on the main process, `None` on the others.
    """
    done = progress.n + len(side)
    path = cache_folder / f"{_cache_key(encoder, side, instruction)}.npz" if accelerator.is_main_process else None
    cached = _read_cache(path) if path is not None else None
    if not broadcast_object_list([cached is not None])[0]:
        cached = _merge(gather_object([_embed_shard(encoder, side, instruction, accelerator, progress)]))
        if accelerator.is_main_process:
            _write_cache(path, *cached)
    progress.update(done - progress.n)
    return cached if accelerator.is_main_process else None


def fingerprint_folder(folder):
    """Hash of the files of a model folder that decide its embeddings, as hex digits; cards and pictures do not."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in MODEL_FILES:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def write_atomically(path, write):
    """Calls `write(file)` on a temporary binary file beside `path`, then renames it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def _embed_shard(encoder, side, instruction, accelerator, progress):
    """This process's rows: `(indices, embeddings, skipped)`, the skipped ones by index in the whole side."""
    indices = np.arange(accelerator.process_index, len(side), accelerator.num_processes)
    parts, skipped = [], []
    size = CHUNK_BATCHES * encoder.batch_size
    for start in range(0, len(indices), size):
        chunk, report = indices[start : start + size], []
        parts.append(encoder.encode(list(side.items(chunk)), instruction, report))
        skipped += [{"index": int(chunk[entry["index"]]), "reason": str(entry["reason"])} for entry in report]
        progress.update(min(len(chunk) * accelerator.num_processes, len(side) - start * accelerator.num_processes))
    return indices, parts, skipped


def _merge(shards):
    parts = [(indices, np.concatenate(parts)) for indices, parts, _ in shards if parts]
    embeddings = np.empty((sum(len(indices) for indices, _ in parts), parts[0][1].shape[1]), dtype=np.float32)
    for indices, rows in parts:
        embeddings[indices] = rows
    return embeddings, sorted(
        (entry for _, _, skipped in shards for entry in skipped), key=lambda entry: entry["index"]
    )


def _cache_key(encoder, side, instruction):
    return hashlib.sha256(json.dumps([encoder.fingerprint, instruction, side.digest]).encode()).hexdigest()[:32]


def _read_cache(path):
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return stored["embeddings"], json.loads(str(stored["skipped"]))


def _write_cache(path, embeddings, skipped):
    write_atomically(path, lambda file: np.savez(file, embeddings=embeddings, skipped=json.dumps(skipped)))


def _model_folder(path):
    folder = Path(path).expanduser()
    if not folder.is_dir():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local:
            raise UvrbError(f"No model at {path}: give the folder of a GVE repo, or its name on the Hub.")
        try:
            folder = Path(snapshot_download(path))
        except Exception as error:  # the Hub client raises a dozen kinds here
            raise UvrbError(f"No model at {path}: {str(error).partition(chr(10))[0]}") from error
    if not (folder / "config.json").is_file():
        raise UvrbError(f"No model at {path}: the folder has no config.json.")
    return folder
