"""All five repos go to the stand-in Hub with the real clients and are loaded back by name, as a user loads them."""

import json
from pathlib import Path

import pytest
from hub_repos import write_repos, write_results

from hub_cards.assemble import assemble


pytest_plugins = ["hub_fixtures"]
CHECKOUT = {"PYTHONPATH": str(Path(__file__).parents[1])}
REPOS = {
    "gve-mini": "models",
    "uvrb-mini": "datasets",
    "uvrb_abilities": "spaces",
    "uvrb_retrieval": "spaces",
    "uvrd-mini": "datasets",
}


@pytest.fixture(scope="module")
def root(model, processor, tmp_path_factory):
    """Folder of the namespaces, with all five repos ready to be pushed."""
    folder = write_repos(tmp_path_factory.mktemp("hub_root"), model, processor)
    write_results(folder / "eval" / "tiny")
    assemble(folder, results_dir=folder / "eval" / "tiny")
    return folder


def files_of(hub, kind, name):
    repo = json.loads((hub.hub.storage.repos / kind / f"org--{name}.json").read_text())
    return set(repo["commits"][repo["branches"]["main"]]["files"])


def test_five_repos_round_trip_by_name(hub, root, run_client):
    publish = ["-m", "hub_cards.publish", "--namespace", "org", "--root", root]
    pushed = run_client(publish, env=CHECKOUT).stdout.split()
    prefixes = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
    assert pushed == [f"{hub.url}/{prefixes[kind]}org/{name}" for name, kind in REPOS.items()]
    assert not any(path.startswith("run/") for path in files_of(hub, "models", "gve-mini"))
    assert {"README.md", "results/uvrb-mini.json", "modeling_gve.py"} <= files_of(hub, "models", "gve-mini")

    proof = run_client(["-m", "hub_cards.prove", "--base", "org"], env=CHECKOUT).stdout
    for call in (
        'AutoModel.from_pretrained("org/gve-mini", trust_remote_code=True)\n    GVEModel of',
        'load_dataset("org/uvrb-mini", split="test")\n    12 rows',
        'load_dataset("org/uvrb-mini", "msrvtt-corpus", split="test")\n    6 rows',
        'load_dataset("org/uvrd-mini", split="train", streaming=True)',
        'load_dataset("org/uvrd-mini", "t2v", split="validation")\n    2 rows',
        '"0 msrvtt"\namong 6 videos of msrvtt-corpus',
        "v0  <- the right one",
        'evaluate.load("org/uvrb_retrieval")\n    UvrbRetrieval',
        "0.599 over abilities",
        "proved:",
    ):
        assert call in proof, proof


def test_publishing_again_uploads_nothing_and_drops_what_is_gone(hub, root, run_client):
    publish = ["-m", "hub_cards.publish", "--namespace", "org", "--root", root, "--repo", "uvrd-mini"]
    run_client(publish, env=CHECKOUT)
    gone = root / "org" / "uvrd-mini" / "stale.txt"
    gone.write_text("of an earlier build")
    run_client(publish, env=CHECKOUT)
    assert "stale.txt" in files_of(hub, "datasets", "uvrd-mini")
    gone.unlink()
    before = len(hub.log)
    run_client(publish, env=CHECKOUT)
    assert "stale.txt" not in files_of(hub, "datasets", "uvrd-mini")
    assert [entry for entry in hub.log[before:] if entry[0] == "PUT"] == []


LOADED = {
    "full": """
from transformers import AutoModel
model = AutoModel.from_pretrained("org/gve-full", trust_remote_code=True)
print(tuple(model.encode(["a red circle"]).shape))
""",
    "lora": """
import sys, torch
from peft import PeftModel
from transformers import AutoModel
items = ["a red circle", "it turns"]
merged = AutoModel.from_pretrained("org/gve-lora", trust_remote_code=True).encode(items)
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
plain = base.encode(items)
adapted = PeftModel.from_pretrained(base, "org/gve-lora", subfolder="adapter").eval().base_model.model.encode(items)
print(float((merged - adapted).abs().max()), float((merged - plain).abs().max()))
""",
}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_pushes_what_it_trained(hub, root, run_client, tmp_path, method):
    name, base = f"gve-{method}", root / "org" / "gve-mini"
    settings = {
        "model": base,
        "pairs": root / "org" / "uvrd-mini",
        "tasks": "t2v",
        "method": method,
        "epochs": 1,
        "steps_per_epoch": 3,
        "learning_rate": 0.01,
        "batch_size": 2,
        "hard_negatives": 0,
        "probe_pairs": 2,
        "output_dir": tmp_path / "trained",
        "hub_model_id": f"org/{name}",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    launch = ["-m", "accelerate.commands.launch", Path(__file__).parents[1] / "training" / "pyramid.py"]
    run_client([*launch, *words, "--push_to_hub"], env=CHECKOUT | {"ACCELERATE_USE_CPU": "true"})
    files = files_of(hub, "models", name)
    assert {"README.md", "config.json", "model.safetensors", "modeling_gve.py", "training_run.json"} <= files
    assert not any(path.startswith("run/") for path in files)
    adapter = {f"adapter/{file}" for file in ("adapter_config.json", "adapter_model.safetensors", "README.md")}
    assert files & adapter == (adapter if method == "lora" else set())

    card = (tmp_path / "trained" / "README.md").read_text()
    assert f'AutoModel.from_pretrained("org/{name}", ' in card and "org/trained" not in card
    assert f"| method | {method} |" in card and "- steps: 3" in card
    assert "![Curriculum of" in card and "curriculum.png" in files
    if method == "full":
        assert run_client(["-c", LOADED[method]]).stdout.splitlines()[-1] == "(1, 32)"
    else:
        assert f'"org/{name}", subfolder="adapter")' in (tmp_path / "trained" / "adapter/README.md").read_text()
        loaded = run_client(["-c", LOADED[method], base]).stdout.splitlines()[-1]
        to_adapter, to_base = map(float, loaded.split())
        assert to_adapter < 1e-5 and to_base > 1e-4
