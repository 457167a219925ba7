"""GVE in mteb: any GVE repo as a model of unmodified mteb, with the vectors of `GVEModel.encode`.

```python
import mteb
from modeling_gve.mteb_gve import gve_meta

mteb.evaluate(gve_meta("build/hub/org/gve-mini"), mteb.get_tasks(tasks=["MSVDT2VRetrieval"]))
```

mteb decodes videos with torchcodec; GVE takes its uniform frames and their real times from the opened decoder.
"""

from pathlib import Path

import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch.utils.data import DataLoader

from modeling_gve.configuration_gve import GVEConfig
from modeling_gve.modeling_gve import GVEModel
from modeling_gve.processing_gve import GVEProcessor


# Texts go to the model so many at once, so that it can sort them by length; media by the batch, as they are opened.
TEXTS_AT_ONCE = 4096
MEDIA = ("image", "video")


class GVEMtebEncoder(AbsEncoder):
    """What mteb calls: queries with the task's prompt as instruction, documents without.

    Args:
        model_name (`str`): what mteb calls the model.
        revision (`str`, *optional*): of a repo of the Hub.
        path (`str`, *optional*): folder or Hub name of the repo, by default `model_name`.
        device (`str`, *optional*): default a GPU where there is one.
        embed_dim (`int`, *optional*): leading dimensions to keep.
        model_kwargs: of `from_pretrained`, such as `dtype`.
    """

    def __init__(self, model_name, revision=None, *, path=None, device=None, embed_dim=None, **model_kwargs):
        path = path or model_name
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = GVEModel.from_pretrained(path, revision=revision or "main", **model_kwargs).to(device).eval()
        self.processor = GVEProcessor.from_pretrained(path, revision=revision or "main")
        self.embed_dim = embed_dim

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata,
        hf_split,
        hf_subset,
        prompt_type=None,
        batch_size=32,
        show_progress_bar=False,
        **kwargs,
    ):
        """Embeddings of all rows of mteb's loader, float32 of shape `(N, D)`, as a numpy array."""
        documents = prompt_type == PromptType.document
        instruction = None if documents else self.get_instruction(task_metadata, prompt_type) or None
        parts = [
            self.model.encode(
                items,
                self.processor,
                instruction=instruction,
                batch_size=batch_size,
                truncate_dim=self.embed_dim,
                show_progress_bar=show_progress_bar,
            )
            for items in _chunks(inputs)
        ]
        return torch.cat(parts).numpy()

    def similarity(self, embeddings1, embeddings2):
        """Cosines of shape `(N, M)` in float64: videos that lie closer than float32 resolves keep their true order."""
        sides = (torch.atleast_2d(torch.as_tensor(side)).double() for side in (embeddings1, embeddings2))
        left, right = (torch.nn.functional.normalize(side, dim=-1) for side in sides)
        return left @ right.T


def gve_meta(path: str, name: str | None = None, **loader_kwargs) -> ModelMeta:
    """mteb's description of a GVE repo, with its loader.

    Args:
        path (`str`): folder or Hub name of the repo.
        name (`str`, *optional*): `"organisation/model"`, under which mteb files results; by default the last two parts
            of `path`.
        loader_kwargs: further arguments of [`GVEMtebEncoder`].
    """
    config = GVEConfig.from_pretrained(path)
    folder = Path(path).resolve()
    name = name or (f"{folder.parent.name or 'local'}/{folder.name}" if folder.is_dir() else path)
    with torch.device("meta"):
        shapes = GVEModel(config)
    n_parameters = sum(parameter.numel() for parameter in shapes.parameters())
    n_embedding_parameters = shapes.get_input_embeddings().weight.numel()
    dims = [config.embedding_dim, *(dim for dim in config.matryoshka_dims if dim != config.embedding_dim)]
    return ModelMeta(
        loader=GVEMtebEncoder,
        loader_kwargs={"path": str(path), **loader_kwargs},
        name=name,
        revision=None if folder.is_dir() else "main",
        release_date=None,
        languages=["eng-Latn"],
        modalities=["text", "image", "video"],
        n_parameters=n_parameters,
        n_embedding_parameters=n_embedding_parameters,
        memory_usage_mb=None,
        max_tokens=config.max_length,
        embed_dim=dims if len(dims) > 1 else dims[0],
        license=None,  # that of the backbone may be another
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "Sentence Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
    )


def _chunks(loader):
    """Yields lists of items: each batch with media, texts many batches at once."""
    texts = []
    for batch in loader:
        names = [name for name in ("text", *MEDIA) if name in batch]
        items = [dict(zip(names, row)) for row in zip(*(batch[name] for name in names))]
        if any(name in batch for name in MEDIA):
            yield items
            continue
        texts += items
        if len(texts) >= TEXTS_AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts
