"""Saved repos: bit-equal after reloading, by class or with trust_remote_code in a process that does not know us."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rendering import draw_frames

from modeling_gve import GVEModel, GVEProcessor


PROGRAM = """
import os, sys, importlib.util
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoProcessor
assert importlib.util.find_spec("rendering") is None
sys.modules["modeling_gve"] = None  # an editable install must not lend its code
repo = sys.argv[1]
torch.set_num_threads(1)
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
assert model.backbone.visual.patch_embed.__class__.__name__ == "GVEPatchEmbed"
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
frames = np.load("frames.npy")
items = ["a red square", {"video": frames, "fps": 3, "text": "left"}, {"video": "square.mp4"}, {"image": frames[0]}]
embeddings = model.encode(items)
assert (model.encode(items, processor) == embeddings).all()
report = []
model.encode([{"video": "gone.mp4"}], processor, errors="skip", report=report)
assert report == [{"index": 0, "reason": "gone.mp4: no such video file"}]
model.save_pretrained("again")
processor.save_pretrained("again")
np.save("embeddings.npy", embeddings.numpy())
"""


@pytest.fixture(scope="module")
def repo(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("repo")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_repo_holds_the_code_and_no_stray_file(repo):
    code = {path.name for path in repo.glob("*.py")}
    names = ("batching", "configuration", "layers", "modeling", "processing", "video")
    assert code == {f"{name}_gve.py" for name in names}


def test_reloading_by_class_is_bit_equal(repo, model, processor, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    loaded, info = GVEModel.from_pretrained(repo, output_loading_info=True)
    assert not any(info.values())
    assert all((loaded.state_dict()[name] == value).all() for name, value in model.state_dict().items())
    reloaded = GVEProcessor.from_pretrained(repo)
    limits = ("num_frames", "max_tokens_per_frame", "max_length", "instruction")
    assert all(getattr(reloaded, name) == getattr(processor, name) for name in limits)
    items = ["a", {"video": draw_frames(8), "fps": 2}]
    assert (loaded.encode(items) == model.encode(items, processor)).all()
    assert not caplog.records


def test_limits_can_be_changed_on_loading(repo):
    processor = GVEProcessor.from_pretrained(repo, num_frames=4, max_tokens_per_frame=10)
    batch = processor({"video": draw_frames(8), "fps": 2})
    assert batch["video_grid_thw"].tolist() == [[2, 6, 6]]


def test_another_precision_reaches_every_weight(repo):
    loaded = GVEModel.from_pretrained(repo, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.encode(["a"]).dtype == torch.float32


def test_a_process_that_does_not_know_this_project_loads_the_repo(repo, model, processor, video_path, tmp_path):
    frames = draw_frames(8)
    np.save(tmp_path / "frames.npy", frames)
    (tmp_path / "square.mp4").write_bytes(Path(video_path).read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", PROGRAM, str(repo)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "run the custom code" not in done.stdout and "You are using a model of type" not in done.stderr
    items = ["a red square", {"video": frames, "fps": 3, "text": "left"}, {"video": video_path}, {"image": frames[0]}]
    assert (np.load(tmp_path / "embeddings.npy") == model.encode(items, processor).numpy()).all()
    again = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert again == {path.name for path in repo.glob("*.py")}
    assert (tmp_path / "again/model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()
