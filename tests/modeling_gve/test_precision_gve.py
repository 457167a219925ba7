"""What fewer bytes cost on rendered videos, embedded by the base that GVE-mini starts from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_builders.mini.render import frame_times, render
from dataset_builders.mini.texts import describe
from dataset_builders.mini.world import FPS, Film, draw_scene, generator
from modeling_gve import VideoFrames, parity, quantize_embeddings
from modeling_gve.video_gve import uniform_indices


BASE = Path(__file__).parents[2] / "training" / "gve-mini-base"


@pytest.fixture(scope="module")
def rendered():
    """Model, embeddings of 48 films and of a text on each."""
    model, processor = parity.load(BASE)
    videos, texts = [], []
    for index in range(48):
        rng = generator("precision", 0, index)
        film = Film((draw_scene(rng, False, things=(1, 3), events=(1, 2), camera=0.45),))
        chosen = uniform_indices(len(frame_times(film)), 8)
        videos.append({"video": VideoFrames(render(film, chosen), chosen / FPS)})
        texts.append(describe(rng, film, "detailed").text)
    return model, model.encode(videos, processor), model.encode(texts, processor)


def costs(model, videos, texts, precision):
    """Largest error of a text's cosine with a video, and the share of each text's ten best that stay among them."""
    calibration = torch.cat([videos, texts])
    few = [quantize_embeddings(each, precision, calibration) for each in (texts, videos)]
    expected, scores = model.similarity(texts, videos), model.similarity(*few)
    best = [{*row.topk(10).indices.tolist()} for row in expected]
    kept = np.mean([len(each & {*row.topk(10).indices.tolist()}) / 10 for each, row in zip(best, scores)])
    return float((scores - expected).abs().max()), float(kept)


@pytest.mark.parametrize(
    ("precision", "bytes_saved", "largest_error", "least_kept"),
    [("bfloat16", 2, 0.005, 0.9), ("int8", 4, 0.01, 0.9), ("ubinary", 32, 0.6, 0.4)],
)
def test_costs_on_rendered_videos(precision, bytes_saved, largest_error, least_kept, rendered):
    model, videos, texts = rendered
    error, kept = costs(*rendered, precision)
    print(f"{precision}: cosines err by at most {error:.4f}, {kept:.0%} of the ten best stay")
    assert 0 < error < largest_error and least_kept < kept
    small = quantize_embeddings(videos, precision, torch.cat([videos, texts]))
    assert small.nbytes * bytes_saved == videos.nbytes
