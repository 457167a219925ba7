"""Other doors to the same repo: sentence-transformers in a process that does not know us, and unmodified mteb."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from rendering import draw_frames

from modeling_gve import GVEModel
from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files


PROGRAM = """
import sys
import numpy as np, torch
sys.modules["modeling_gve"] = None  # an editable install must not lend its code
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
assert type(model[0]).__module__.startswith("transformers_modules.")
frames = np.load("frames.npy")
items = ["a red square", {"video": frames, "fps": 3, "text": "left"}, {"video": "square.mp4"}, {"image": frames[0]}]
embeddings = [model.encode(items), model.encode_query(items, prompt="Find it.")]
assert model.get_embedding_dimension() == 32 and model.max_seq_length == 8192 and model.similarity_fn_name == "cosine"
assert model.encode(items, truncate_dim=8, normalize_embeddings=True).shape == (4, 8)
assert model.supports(("text", "image", "video"))
model.save("again")
again = SentenceTransformer("again", trust_remote_code=True, device="cpu")
assert (again.encode(items[0]) == model.encode(items[0])).all()
np.save("embeddings.npy", np.stack(embeddings))
"""


@pytest.fixture(scope="module")
def repo(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("doors") / "gve-tiny"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    write_sentence_transformers_files(path, model.config)
    return path


def test_the_files_of_sentence_transformers(repo, model, backbone_config):
    (module,) = json.loads((repo / "modules.json").read_text())
    assert module["type"] == "sentence_transformers_gve.GVETransformer" and module["path"] == ""
    assert (repo / "sentence_transformers_gve.py").is_file() and not list(repo.glob("*.tmp"))
    with pytest.raises(ValueError, match="'qwen2_5_vl': convert it to a GVE repo first"):
        write_sentence_transformers_files(repo, backbone_config)


def test_sentence_transformers_in_a_process_that_does_not_know_this_project(
    repo, model, processor, video_path, tmp_path
):
    pytest.importorskip("sentence_transformers")
    frames = draw_frames(8)
    np.save(tmp_path / "frames.npy", frames)
    (tmp_path / "square.mp4").symlink_to(video_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", PROGRAM, str(repo)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    items = ["a red square", {"video": frames, "fps": 3, "text": "left"}, {"video": video_path}, {"image": frames[0]}]
    plain, asked = torch.from_numpy(np.load(tmp_path / "embeddings.npy"))
    torch.testing.assert_close(plain, model.encode(items, processor), rtol=0, atol=1e-5)
    torch.testing.assert_close(asked, model.encode(items, processor, instruction="Find it."), rtol=0, atol=1e-5)


@pytest.fixture
def mteb_encoder(repo):
    pytest.importorskip("mteb")
    from modeling_gve.mteb_gve import gve_meta

    meta = gve_meta(str(repo))
    encoder = meta.loader(meta.name, meta.revision, device="cpu", **meta.loader_kwargs)
    encoder.mteb_model_meta = meta
    return encoder


def test_what_mteb_learns_of_a_repo(repo, model, mteb_encoder):
    meta = mteb_encoder.mteb_model_meta
    assert meta.name.endswith("/gve-tiny") and meta.name.count("/") == 1 and meta.embed_dim == 32
    assert meta.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert meta.modalities == ["text", "image", "video"] and meta.use_instructions and meta.open_weights


def test_unmodified_mteb_ranks_as_encode_does(mteb_encoder, model, processor, tmp_path):
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    images = [Image.fromarray(draw_frames(1, seed=seed)[0]) for seed in range(6)]
    texts = ["a red square", "moves to the left", "a helpful assistant"]
    instruction = "Find the image."
    queries = model.encode(texts, processor, instruction=instruction)
    scores = queries @ model.encode([{"image": image} for image in images], processor).T
    best = scores.argmax(dim=1).tolist()
    corpus = Dataset.from_dict({"id": [f"d{n}" for n in range(6)], "image": images})

    class TextToImage(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="GVETinyT2IRetrieval",
            description="Six rendered pictures.",
            dataset={"path": "gve/tiny", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
            prompt={"query": instruction},
        )

        def load_data(self, **kwargs):
            relevant = {f"q{n}": {f"d{place}": 1} for n, place in enumerate(best)}
            asked = Dataset.from_dict({"id": list(relevant), "text": texts})
            data = RetrievalSplitData(corpus=corpus, queries=asked, relevant_docs=relevant, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    seen = {}
    encode = mteb_encoder.encode
    mteb_encoder.encode = lambda inputs, prompt_type=None, **kwargs: seen.setdefault(
        prompt_type.value, encode(inputs, prompt_type=prompt_type, **kwargs)
    )
    result = mteb.evaluate(mteb_encoder, TextToImage(), cache=None, co2_tracker=False, show_progress_bar=False)
    torch.testing.assert_close(torch.from_numpy(seen["query"]), queries, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(seen["query"] @ seen["document"].T), scores, rtol=0, atol=1e-5)
    (found,) = result.task_results[0].scores["test"]
    assert found["ndcg_at_1"] == 1.0


def test_near_ties_are_told_apart_in_mteb(mteb_encoder):
    query, near = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0 + 2e-4, 0.0], [1.0, 1.0 + 1e-4, 0.0]])
    scores = mteb_encoder.similarity(query.numpy(), near.numpy())
    assert scores.shape == (1, 2) and 1e-10 < scores[0, 1] - scores[0, 0] < 1e-8


def test_mteb_gets_truncated_dimensions(repo, mteb_encoder, model, processor):
    from torch.utils.data import DataLoader

    mteb_encoder.embed_dim = 16
    rows = mteb_encoder.encode(
        DataLoader([{"text": "a"}, {"text": "b"}], batch_size=1),
        task_metadata=None,
        hf_split="test",
        hf_subset="default",
        prompt_type=_document(),
    )
    expected = GVEModel.encode(model, ["a", "b"], processor, truncate_dim=16)
    torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=0, atol=1e-5)


def _document():
    from mteb.types import PromptType

    return PromptType.document
