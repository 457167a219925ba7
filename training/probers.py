"""Embedders that judge pairs from outside the run: the prober of the first epoch, and of hard-negative mining."""

from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from PIL import Image
from transformers import AutoModel, PretrainedConfig


class SentenceTransformerProber:
    """A sentence-transformers model, of text alone or of several modalities, with GVE's `encode`.

    Args:
        model (`SentenceTransformer`): loaded.
    """

    def __init__(self, model):
        self.model = model

    def reads(self, side):
        """Whether the model takes all that a [`Side`] holds."""
        kinds = tuple(sorted(kind for kind, value in side._asdict().items() if value is not None))
        return self.model.supports(kinds[0] if len(kinds) == 1 else kinds)

    def encode(self, items):
        """Embeddings of items as `GVEModel.encode` takes them: `(N, D)`, L2-normalised, on the CPU."""
        instructions = [item.get("instruction") for item in items]
        inputs = [self._input(item) for item in items]
        rows = torch.empty(len(items), self.model.get_embedding_dimension())
        for instruction in dict.fromkeys(instructions):
            places = [place for place, each in enumerate(instructions) if each == instruction]
            prompt = None if instruction is None else f"{instruction}\n"
            rows[places] = self.model.encode(
                [inputs[place] for place in places],
                prompt=prompt,
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            ).to("cpu", torch.float32)
        return rows

    @staticmethod
    def _input(item):
        parts = {}
        if item.get("text"):
            parts["text"] = item["text"]
        if item.get("image") is not None:
            parts["image"] = Image.fromarray(item["image"])
        if item.get("video") is not None:
            parts["video"] = torch.from_numpy(item["video"].frames.copy()).movedim(-1, 1)
        return parts["text"] if set(parts) == {"text"} else parts


class ModelProber:
    """A model that brings `encode(items)`, such as a GVE repo; its code is run."""

    def __init__(self, model):
        self.model = model

    def reads(self, side):
        return True

    def encode(self, items):
        """Embeddings of items: `(N, D)`, L2-normalised, on the CPU."""
        return torch.nn.functional.normalize(self.model.encode(items).float(), dim=-1).cpu()


def load_prober(name, device):
    """An embedder by folder or Hub name: a repo whose model has `encode(items)`, or a sentence-transformers one.

    Raises:
        ValueError: it is neither, or cannot be loaded.
    """
    try:
        # Other embedders may have an `encode` too, whose items are not GVE's: sentence-transformers knows theirs.
        if _has_file(name, "modules.json") and not _is_gve(name):
            return SentenceTransformerProber(_sentence_transformer(name, device))
        model = AutoModel.from_pretrained(name, trust_remote_code=True)
        if hasattr(model, "encode"):
            return ModelProber(model.to(device).eval())
    except Exception as error:  # the repo's own code may raise anything
        raise ValueError(f"cannot load prober {name!r}: {' '.join(str(error).split())}") from error
    raise ValueError(
        f"prober {name!r} has no encode(items) and no modules.json: give a GVE repo, a model with that method, or a "
        "sentence-transformers repo"
    )


def _is_gve(name):
    try:
        return PretrainedConfig.get_config_dict(name)[0].get("model_type") == "gve"
    except OSError:  # sentence-transformers has repos without a config.json
        return False


def _sentence_transformer(name, device):
    if find_spec("sentence_transformers") is None:
        raise ValueError("it is a sentence-transformers model: pip install sentence-transformers")
    from sentence_transformers import SentenceTransformer  # optional: only such a prober needs it

    return SentenceTransformer(str(name), device=str(device), trust_remote_code=True)


def _has_file(name, file):
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    try:
        return file_exists(name, file)
    except HFValidationError:
        return False
    except (HfHubHTTPError, OfflineModeIsEnabled):  # nodes without the Hub have what was loaded before
        return isinstance(try_to_load_from_cache(name, file), str)
