"""What turns items into vectors for the runner: GVE repos, sentence-transformers models, models of mteb, and chance.

Every encoder has `name`, `path`, `fingerprint` (of all that decides its vectors but its limits), `limits`,
`batch_size`, `limit(limits)`, which sets `num_frames` and `max_tokens_per_frame`,
`encode(items, instruction, skipped)`, which gives float32 of shape `(N, D)` with NaN rows for the broken items that it
appends to `skipped`, and `release()`, which frees its memory.
"""

import gc
import hashlib
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, PretrainedConfig

from evaluate_metrics.retrieval_data import MODALITIES, UvrbError, digest_item, first_line
from modeling_gve import GVEModel
from modeling_gve.video_gve import load_image, load_video
from modeling_gve.vision_memory import VisionMemory


BACKBONES = ("qwen2_5_vl", "qwen3_vl")
MODEL_FILES = (".json", ".safetensors", ".bin", ".py", ".jinja", ".txt", ".model")
NUM_FRAMES = 8  # of a video, by the paper's protocol


def open_encoder(path, device, dtype="auto", batch_size=32):
    """The encoder for a model as the command line names it; weights are loaded when they are first needed.

    Args:
        path (`str`): `random`, `mteb:NAME` for a model of mteb's registry, or a folder or Hub repo: one with
            sentence-transformers' `modules.json` is loaded by that library (`sentence-transformers:PATH` insists on
            it), any other, and GVE's own, as a GVE repo. Its code is run (`trust_remote_code`).
        device (`torch.device`): where it runs.
        dtype (`str`): of the weights, as `from_pretrained` takes it.
        batch_size (`int`): items a forward pass.

    Raises:
        UvrbError: nothing there to load.
    """
    kind, _, name = path.rpartition(":")
    if path == "random":
        return RandomEncoder(batch_size)
    if kind == "mteb":
        return MtebEncoder(name, device, dtype, batch_size)
    folder = _model_folder(name if kind == "sentence-transformers" else path)
    if kind == "sentence-transformers" or _is_sentence_transformers(folder):
        return SentenceTransformersEncoder(path, folder, device, dtype, batch_size)
    return GVEEncoder(path, folder, device, dtype, batch_size)


class GVEEncoder:
    """A model repo with an `encode` method, or a backbone before it becomes GVE."""

    def __init__(self, path, folder, device, dtype, batch_size):
        self.name = Path(path).name
        self.path, self.folder, self.device, self.dtype, self.batch_size = path, folder, device, dtype, batch_size
        self.fingerprint = f"{fingerprint_folder(folder)}-{dtype}"
        self.limits = {}
        self.vision_memory = None  # folder of a [`VisionMemory`]
        self._model = self._processor = self._memory = None

    def limit(self, limits):
        """Set `num_frames` and `max_tokens_per_frame`; what is not there stays the model's own."""
        if limits != self.limits:
            self.release()
            self.limits = dict(limits)

    def encode(self, items, instruction, skipped):
        if self._model is None:
            self._load()
        processor = {} if self._processor is None else {"processor": self._processor}
        embeddings = self._model.encode(
            items, instruction=instruction, batch_size=self.batch_size, errors="skip", report=skipped, **processor
        )
        return embeddings.float().cpu().numpy()

    def release(self):
        if self._memory is not None:
            self._memory.save()
        self._model = self._processor = self._memory = None
        gc.collect()

    def _load(self):
        try:
            if _config(self.folder).get("model_type") in BACKBONES:
                limits = {**frame_limit(self.folder), **self.limits}
                model = GVEModel.from_pretrained(str(self.folder), dtype=self.dtype, **limits)
            else:
                model = AutoModel.from_pretrained(self.folder, trust_remote_code=True, dtype=self.dtype)
                if self.limits:
                    self._processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=True, **self.limits)
        except (OSError, ValueError) as error:
            raise UvrbError(f"Cannot load the model at {self.path}: {first_line(error)}") from error
        if not hasattr(model, "encode"):
            raise UvrbError(f"The model at {self.path} is a {type(model).__name__} without `encode`; give a GVE repo.")
        self._model = model.to(self.device).eval()
        if self.vision_memory is not None:
            self._memory = VisionMemory(model.backbone.visual.requires_grad_(False), self.vision_memory)


class SentenceTransformersEncoder:
    """A model that `SentenceTransformer` loads; the instruction is its prompt, videos come as frames with their times.

    A model that lacks a modality is an error, not a run of misses.
    """

    def __init__(self, path, folder, device, dtype, batch_size):
        self.name = Path(path).name
        self.path, self.folder, self.device, self.dtype, self.batch_size = path, folder, device, dtype, batch_size
        self.fingerprint = f"st-{fingerprint_folder(folder, deep=True)}-{dtype}"  # told from the same repo as GVE
        self.limits = {}
        self._model = None

    def limit(self, limits):
        if "max_tokens_per_frame" in limits:
            raise UvrbError(f"max_tokens_per_frame cannot be set for {self.path}: its own processor decides.")
        self.limits = dict(limits)

    def encode(self, items, instruction, skipped):
        if self._model is None:
            self._load()
        for item in items:
            kind = next(iter(item)) if len(item) == 1 else tuple(sorted(item))
            if not self._model.supports(kind):
                raise UvrbError(f"The model at {self.path} embeds no {'+'.join(item)}; leave such datasets out.")
        return encode_or_skip(items, skipped, self._prepare, lambda inputs: self._encode(inputs, instruction))

    def release(self):
        self._model = None
        gc.collect()

    def _prepare(self, item):
        prepared = {}
        for name, value in item.items():
            prepared[name] = value
            if name == "image":
                prepared[name] = Image.fromarray(load_image(value))
            elif name == "video":
                video = load_video(value, self.limits.get("num_frames", NUM_FRAMES))
                seconds = float(video.times[-1] - video.times[0]) or 1.0
                clock = {"fps": (len(video.times) - 1) / seconds, "total_num_frames": len(video.times)}
                clock |= {"duration": seconds, "frames_indices": list(range(len(video.times)))}
                prepared[name] = {"array": video.frames, "video_metadata": clock}
        return prepared["text"] if list(prepared) == ["text"] else prepared

    def _encode(self, inputs, instruction):
        return self._model.encode(
            inputs, prompt=instruction, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True
        )

    def _load(self):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UvrbError(f"{self.path} needs sentence-transformers: pip install 'gve[judge]'.") from error
        keywords = {} if self.dtype == "auto" else {"dtype": self.dtype}
        try:
            self._model = SentenceTransformer(
                str(self.folder), device=str(self.device), trust_remote_code=True, model_kwargs=keywords
            )
        except (OSError, ValueError, TypeError) as error:
            raise UvrbError(f"Cannot load the model at {self.path}: {first_line(error)}") from error


class MtebEncoder:
    """A model of mteb's registry; the instruction is the task's prompt. mteb decodes videos with torchcodec."""

    def __init__(self, name, device, dtype, batch_size):
        try:
            import mteb
        except ImportError as error:
            raise UvrbError(f"mteb:{name} needs mteb: pip install 'gve[judge]'.") from error
        self._mteb = mteb
        self.name, self.path = name.rpartition("/")[2], f"mteb:{name}"
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        try:
            self._meta = mteb.get_model_meta(name)
        except (KeyError, ValueError) as error:
            raise UvrbError(f"mteb knows no model {name}: {first_line(error)}") from error
        self._registered = name
        self.fingerprint = hashlib.sha256(f"{mteb.__version__} {name} {self._meta.revision}".encode()).hexdigest()
        self.limits = {}
        self._model = None

    def limit(self, limits):
        if limits:
            raise UvrbError(f"{', '.join(limits)} cannot be set for {self.path}: mteb's wrapper decides.")

    def encode(self, items, instruction, skipped):
        if self._model is None:
            keywords = {} if self.dtype == "auto" else {"model_kwargs": {"dtype": self.dtype}}
            self._model = self._mteb.get_model(self._registered, device=str(self.device), **keywords)
        return encode_or_skip(items, skipped, dict, lambda inputs: self._encode(inputs, instruction))

    def release(self):
        self._model = None
        gc.collect()

    def _encode(self, items, instruction):
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        kind = PromptType.document if instruction is None else PromptType.query
        metadata = self._metadata(items, instruction)
        features = {"text": datasets.Value("string"), "image": datasets.Image(), "video": datasets.Video()}
        present = [name for name in MODALITIES if name in items[0]]
        rows = datasets.Dataset.from_list(
            [{"id": str(place), **item} for place, item in enumerate(items)],
            features=datasets.Features({"id": features["text"], **{name: features[name] for name in present}}),
        )
        loader = create_dataloader(rows, task_metadata=metadata, prompt_type=kind, batch_size=self.batch_size)
        context = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": kind}
        embeddings = self._model.encode(loader, **context, batch_size=self.batch_size, show_progress_bar=False)
        return torch.as_tensor(embeddings).float().cpu().numpy()

    def _metadata(self, items, instruction):
        """What mteb's wrappers ask about the task: the modalities of both sides and the prompt."""
        from mteb.abstasks.task_metadata import TaskMetadata

        letters = "".join(name[0] for name in ("video", "image", "text") if name in items[0])  # mteb's order
        return TaskMetadata(
            name="UVRB",
            description="One side of a dataset of UVRB.",
            dataset={"path": "uvrb", "revision": "0"},
            type="Any2AnyRetrieval",
            category=f"v2{letters}" if instruction is None else f"{letters}2v",
            modalities=list(MODALITIES),
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
            prompt=None if instruction is None else {"query": instruction},
        )


class RandomEncoder:
    """Random directions that depend on the item's content only: the floor that a trained model must leave."""

    name = "random"
    path = "random"
    fingerprint = "random-64"

    def __init__(self, batch_size=32):
        self.batch_size = batch_size
        self.limits = {}

    def limit(self, limits):
        """Limits change nothing here."""

    def encode(self, items, instruction, skipped):
        seeds = (int(digest_item(item)[:16], 16) for item in items)
        return np.stack([np.random.default_rng(seed).standard_normal(64, dtype=np.float32) for seed in seeds])

    def release(self):
        """Nothing to free."""


def encode_or_skip(items, skipped, prepare, encode):
    """`encode(prepared items)`, and where that fails item by item, with a NaN row and a reason for each bad one.

    Raises:
        UvrbError: not one item can be embedded, so it is not the items that are bad.
    """
    try:
        return np.asarray(encode([prepare(item) for item in items]), dtype=np.float32)
    except Exception:  # whatever a library that is not ours raises; the culprit is found below
        rows = {}
    for index, item in enumerate(items):
        try:
            rows[index] = np.asarray(encode([prepare(item)]), dtype=np.float32)[0]
        except Exception as error:
            reason = first_line(error)
            skipped.append({"index": index, "reason": reason})
    if not rows:
        raise UvrbError(f"None of {len(items)} items can be embedded, the last one because: {reason}")
    embeddings = np.full((len(items), len(next(iter(rows.values())))), np.nan, dtype=np.float32)
    embeddings[list(rows)] = list(rows.values())
    return embeddings


def frame_limit(folder):
    """`max_tokens_per_frame` for a backbone whose own image processor allows less than the protocol's 200."""
    processor = AutoImageProcessor.from_pretrained(folder)
    tokens = processor.size["longest_edge"] // (processor.patch_size * processor.merge_size) ** 2
    return {"max_tokens_per_frame": min(200, tokens + 1)}


def fingerprint_folder(folder, deep=False):
    """Hash of the files of a model folder that decide its embeddings, as hex digits; cards and pictures do not.

    Args:
        folder (`str` or `Path`): of the model.
        deep (`bool`, defaults to `False`): sub-folders too.
    """
    digest, folder = hashlib.sha256(), Path(folder)
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_FILES:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _config(folder):
    return PretrainedConfig.get_config_dict(folder)[0]


def _is_sentence_transformers(folder):
    if not (folder / "modules.json").is_file():
        return False
    return not (folder / "config.json").is_file() or _config(folder).get("model_type") not in ("gve", *BACKBONES)


def _model_folder(path):
    folder = Path(path).expanduser()
    if not folder.is_dir():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local:
            raise UvrbError(f"No model at {path}: give the folder of a GVE repo, or its name on the Hub.")
        try:
            folder = Path(snapshot_download(path))
        except Exception as error:  # the Hub client raises a dozen kinds here
            raise UvrbError(f"No model at {path}: {first_line(error)}") from error
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UvrbError(f"No model at {path}: the folder has no config.json.")
    return folder
