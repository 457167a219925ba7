"""Models that are no GVE repos: a sentence-transformers repo with code of its own, and a model of mteb's registry."""

import json

import numpy as np
import pytest
from rendering import draw_frames, write_video

from evaluate_metrics.encoders import SentenceTransformersEncoder, encode_or_skip, open_encoder
from evaluate_metrics.retrieval_data import UvrbError


MODULE = """
import numpy as np
import torch
from sentence_transformers.base.modules import InputModule


class StubModule(InputModule):
    config_keys = []

    @property
    def modalities(self):
        return ["text", "image", "video", ("text", "video")]

    def preprocess(self, inputs, prompt=None, **kwargs):
        return {"rows": torch.tensor([self.row(item, prompt or "") for item in inputs])}

    def row(self, item, prompt):
        item = item if isinstance(item, dict) else {"text": item} if isinstance(item, str) else {"image": item}
        image, video = item.get("image"), item.get("video") or {"array": np.zeros(1), "video_metadata": {"fps": 0.0}}
        pixels = 0.0 if image is None else float(np.asarray(image).mean())
        frames, fps = len(video["array"]), video["video_metadata"]["fps"]
        return [len(item.get("text", "")), len(prompt), pixels, frames, float(video["array"].mean()), fps]

    def forward(self, features, **kwargs):
        return {"sentence_embedding": features["rows"].float()}

    def get_embedding_dimension(self):
        return 6

    def save(self, output_path, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("sentence-stub")
    (folder / "stub_module.py").write_text(MODULE)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "stub_module.StubModule"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "SentenceTransformer"}))
    return str(folder)


def test_sentence_transformers_get_prompt_frames_and_clock(repo, video_path):
    encoder = open_encoder(repo, "cpu", batch_size=2)
    assert isinstance(encoder, SentenceTransformersEncoder)
    items = [{"text": "four"}, {"video": video_path}, {"text": "two", "video": video_path}]
    rows = encoder.encode(items, "Find it.", skipped := [])
    assert not skipped and rows.dtype == np.float32
    assert rows[:, :2].tolist() == [[4, 8], [0, 8], [3, 8]]
    assert rows[1:, 3].tolist() == [8, 8]
    assert rows[1, 5] == pytest.approx(7 / (23 / 8), rel=1e-4)  # 8 frames spread over 24 at 8 a second
    encoder.limit({"num_frames": 4})
    assert encoder.encode(items[1:2], None, [])[0, [1, 3]].tolist() == [0, 4]
    with pytest.raises(UvrbError, match="embeds no text\\+image"):
        encoder.encode([{"text": "x", "image": video_path}], None, [])
    with pytest.raises(UvrbError, match="max_tokens_per_frame cannot be set"):
        encoder.limit({"max_tokens_per_frame": 100})


def test_a_broken_video_is_a_named_miss(repo, tmp_path):
    good = write_video(tmp_path / "good.mp4", draw_frames(8))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    items = [{"video": str(tmp_path / name)} for name in ("bad.mp4", "good.mp4")]
    rows = open_encoder(f"sentence-transformers:{repo}", "cpu").encode(items, None, skipped := [])
    assert np.isnan(rows[0]).all() and np.isfinite(rows[1]).all()
    assert [entry["index"] for entry in skipped] == [0] and "bad.mp4" in skipped[0]["reason"]
    assert good.exists()


def test_when_nothing_can_be_embedded_it_is_not_the_items_fault():
    def encode(inputs):
        raise RuntimeError("out of memory\nand more")

    with pytest.raises(UvrbError, match="None of 2 items can be embedded.*out of memory$"):
        encode_or_skip([{"text": "a"}, {"text": "b"}], [], dict, encode)


def test_mteb_models_get_loaders_and_tasks():
    pytest.importorskip("mteb")
    encoder = open_encoder("mteb:mteb/baseline-random-encoder", "cpu", batch_size=2)
    items = [{"text": "a red square"}, {"text": "a blue square"}, {"text": "a red square"}]
    rows = encoder.encode(items, "Find it.", skipped := [])
    assert rows.shape == (3, 32) and not skipped
    assert (rows[0] == rows[2]).all() and (rows[0] != rows[1]).any()
    metadata = encoder._metadata([{"text": "x", "video": "y"}], "Find it.")
    assert metadata.category == "vt2v" and metadata.prompt == {"query": "Find it."}
    assert encoder.name == "baseline-random-encoder" and encoder.path == "mteb:mteb/baseline-random-encoder"
    with pytest.raises(UvrbError, match="num_frames cannot be set for mteb:"):
        encoder.limit({"num_frames": 8})
    with pytest.raises(UvrbError, match="mteb knows no model no/such"):
        open_encoder("mteb:no/such", "cpu")
