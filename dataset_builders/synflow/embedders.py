"""How well a caption fits its video: the cosine under a GVE or sentence-transformers model, or by the scene graph."""

from functools import lru_cache

import numpy as np

from dataset_builders.synflow.graph import GraphEmbedder
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.sources import film_of


def cosines(recipe, documents):
    """The cosine of each document's text and video: `(N,)` float32, NaN where the model cannot read the video.

    Raises:
        RecipeError: there is no such model, or it embeds no texts or no videos.
    """
    settings = recipe.quality.similarity
    texts = [document.text for document in documents]
    if settings.model == "graph":
        embedder = GraphEmbedder()
        videos = embedder.films([film_of(recipe, document) for document in documents], texts)
        return (embedder.texts(texts) * videos).sum(axis=1)
    from evaluate_metrics.retrieval_data import UvrbError

    try:
        encoder = _open(settings.model, settings.batch_size)
        sides = [{"text": text} for text in texts], [{"video": document.metadata["file"]} for document in documents]
        captions, videos = (_normalised(encoder.encode(items, None, [])) for items in sides)
    except UvrbError as error:
        raise RecipeError(f"quality.similarity.model: {error}") from error
    return (captions * videos).sum(axis=1)


@lru_cache(maxsize=1)
def _open(model, batch_size):
    import torch  # slow to import, and not needed where the graph is read

    from evaluate_metrics.encoders import open_encoder

    torch.set_num_threads(1)  # the flow's tasks are the parallelism
    return open_encoder(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), batch_size=batch_size)


def _normalised(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
