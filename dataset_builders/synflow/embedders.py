"""How well a caption fits its video: the cosine under a GVE or sentence-transformers model, or by the scene graph."""

from functools import lru_cache

import numpy as np

from dataset_builders.synflow.graph import GraphEmbedder
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.sources import film_of


def cosines(recipe, documents):
    """The cosine of each document's text and video: `(N,)` float32, NaN where the model cannot read the video."""
    settings = recipe.quality.similarity
    texts = [document.text for document in documents]
    if settings.model == "graph":
        embedder = GraphEmbedder()
        videos = embedder.films([film_of(recipe, document) for document in documents], texts)
        return (embedder.texts(texts) * videos).sum(axis=1)
    embed = _load(settings.model)
    videos = [{"video": document.metadata["file"]} for document in documents]
    return (embed(texts, settings.batch_size) * embed(videos, settings.batch_size)).sum(axis=1)


@lru_cache(maxsize=1)
def _load(model):
    """`embed(items, batch_size)` to `(N, D)` float32, L2-normalised."""
    import torch
    from transformers import PretrainedConfig

    try:
        kind = PretrainedConfig.get_config_dict(model)[0].get("model_type")
    except (OSError, ValueError):
        kind = None
    torch.set_num_threads(1)  # the flow's tasks are the parallelism
    try:
        if kind == "gve":
            from modeling_gve import GVEModel

            gve = GVEModel.from_pretrained(model).eval()
            return lambda items, size: gve.encode(items, batch_size=size, errors="skip").numpy()
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        problem = f"{model}: neither a GVE nor a sentence-transformers model ({' '.join(str(error).split())[:160]})"
        raise RecipeError(f"quality.similarity.model: {problem}") from error
    return lambda items, size: _normalised(peer.encode(items, batch_size=size, show_progress_bar=False))


def _normalised(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
