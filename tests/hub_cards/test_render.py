"""Cards: valid metadata, figures that come from the run, and one clear line where something is missing."""

import json
import re
import shutil

import pytest
import yaml
from hub_repos import N_VIDEOS, write_repos, write_results
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModel

from hub_cards import render
from hub_cards.assemble import add_ablation, add_results, assemble, copy_metric
from hub_cards.repos import repo_folder, repo_type


RECORD = {
    "command": "accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml",
    "summary": {"steps": 1234},
    "settings": {"temperature": 0.03, "tasks": ["t2v"]},
    "data": {"pairs": "build/hub/org/uvrd-mini"},
}


@pytest.fixture(scope="module")
def built(model, processor, tmp_path_factory):
    """The three repos that training and the builders leave, and the results of a run."""
    root = write_repos(tmp_path_factory.mktemp("built"), model, processor)
    write_results(root / "results", score=0.625)
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy of them to change."""
    return shutil.copytree(built, tmp_path / "root")


def test_model_card_states_results_training_and_calls(root):
    folder = root / "org" / "gve-mini"
    (folder / render.TRAINING_RECORD).write_text(json.dumps(RECORD))
    (folder / render.CURRICULUM_PLOT).write_bytes(b"\x89PNG")
    add_results(root / "results", folder)
    card = render.render_model_card(folder, "me")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["me/uvrd-mini"]
    scores = {result.dataset_config: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert scores == {"msrvtt-queries": ("recall_at_1", 0.625), "ms_ti-queries": ("precision_at_1", 0.3125)}
    for text in (
        'AutoModel.from_pretrained("me/gve-mini", trust_remote_code=True)',
        "accelerate launch evaluate_metrics/run_uvrb.py",
        RECORD["command"],
        "steps: 1234",
        "| temperature | 0.03 |",
        "32 dimensions",
        "(results/uvrb-mini.png)",
        "![Curriculum of gve-mini](curriculum.png)",
    ):
        assert text in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| msrvtt "))
    assert row.split("|")[4].strip() == "0.625"


def test_the_search_of_a_model_card_runs(root, monkeypatch):
    add_results(root / "results", root / "org" / "gve-mini")
    copy_metric("uvrb_retrieval", root / "org" / "uvrb_retrieval")
    monkeypatch.chdir(root)
    model = AutoModel.from_pretrained("org/gve-mini", trust_remote_code=True)
    card = render.render_model_card(root / "org" / "gve-mini").text
    code = next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "evaluate.load" in block)
    names = {"model": model}
    exec(code, names)
    assert sorted(names["ranked"]) == [f"v{n}" for n in range(N_VIDEOS)]


def test_model_card_says_what_a_sweep_found(root):
    folder, sweep = root / "org" / "gve-mini", root / "sweep"
    with pytest.raises(ValueError, match="no summary.md in .*sweep; run python -m training.ablation"):
        add_ablation(sweep, folder)
    sweep.mkdir()
    (sweep / "summary.md").write_text("| study |\n|---|\n| one |\n")
    (sweep / "a_study.png").write_bytes(b"\x89PNG")
    add_ablation(sweep, folder)
    text = render.render_model_card(folder).text
    assert "\n| study |\n|---|\n| one |\n" in text and "![a study](ablation/a_study.png)" in text


def test_model_card_names_no_folder_of_this_machine(root):
    folder = root / "org" / "gve-mini"
    results = json.loads((root / "results" / "results.json").read_text())
    results["models"][0]["path"] = str(folder)
    results["benchmark"] = str(root / "org" / "uvrb-mini")
    (root / "results" / "results.json").write_text(json.dumps(results))
    add_results(root / "results", folder)
    card = render.render_model_card(folder)
    assert str(root) not in str(card)
    assert "--model org/gve-mini --benchmark org/uvrb-mini" in card.text


def test_model_card_names_anybodys_pairs_and_its_own_repo(root):
    """Pairs of the Hub keep their owner; a repo may be named unlike the folder that it was trained into."""
    folder = root / "org" / "gve-mini"
    record = RECORD | {"data": {"pairs": "somebody/pairs"}}
    (folder / render.TRAINING_RECORD).write_text(json.dumps(record))
    card = render.render_model_card(folder, "me", "other")
    assert card.data.datasets == ["somebody/pairs"] and "[somebody/pairs](" in card.text
    assert 'AutoModel.from_pretrained("me/other", trust_remote_code=True)' in card.text
    assert "gve-mini" not in card.text.split("## Training")[0]


def test_model_card_gives_the_settings_of_its_scores(root):
    folder = root / "org" / "gve-mini"
    results = json.loads((root / "results" / "results.json").read_text())
    results["arguments"] = {
        "dtype": "float32",
        "num_frames": [4, 8],
        "truncate_dim": None,
        "classification": ["/x/ucf"],
    }
    (root / "results" / "results.json").write_text(json.dumps(results))
    add_results(root / "results", folder)
    text = render.render_model_card(folder).text
    assert "    --dtype float32 \\\n    --num_frames 4 8 \\\n    --classification org/ucf\n" in text
    assert "truncate_dim None" not in text


def test_a_radar_of_earlier_results_goes(root):
    folder = root / "org" / "gve-mini"
    add_results(root / "results", folder)
    assert "(results/uvrb-mini.png)" in render.render_model_card(folder).text
    (root / "results" / "radar.png").unlink()
    add_results(root / "results", folder)
    assert ".png" not in render.render_model_card(folder).text


@pytest.mark.parametrize("kind, name", [("qwen2_5_vl", "Qwen2.5-VL"), ("qwen3_vl", "Qwen3-VL")])
def test_model_card_names_its_body(root, kind, name):
    path = root / "org" / "gve-mini" / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["model_type"] = kind
    path.write_text(json.dumps(config))
    assert f"\n{name} body without its language-model head" in render.render_model_card(path.parent).text


def test_model_card_without_a_run_says_so(root):
    card = render.render_model_card(root / "org" / "gve-mini")
    assert card.data.eval_results is None
    assert "Not judged yet" in card.text and "Not recorded" in card.text
    assert "curriculum.png" not in card.text


@pytest.mark.parametrize("name", ["uvrb-mini", "uvrd-mini"])
def test_dataset_card_keeps_the_builders_metadata(root, name):
    folder = root / "org" / name
    before = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    for _ in range(2):  # a second time it reads what it wrote itself
        render.render_repo(folder, "me")
        data = DatasetCard.load(folder / "README.md").data.to_dict()
        assert {key: data[key] for key in before} == before
        assert data["license"] == "apache-2.0" and data["size_categories"] == ["n<1K"]
    assert f'load_dataset("me/{name}"' in (folder / "README.md").read_text()


def test_pairs_of_another_builder_keep_its_card(root):
    folder = root / "org" / "uvrd-mini"
    (folder / render.BUILD_RECORD).unlink()  # V-SynFlow and `collected` leave none
    written = (folder / "README.md").read_text() + '\n# Dropped: 3\n\nload_dataset("org/uvrd-mini", "t2v")\n'
    (folder / "README.md").write_text(written)
    render.render_repo(folder, "me")
    assert (folder / "README.md").read_text() == written.replace("org/", "me/")


def test_dataset_cards_count_their_rows_and_name_their_build(root):
    (root / "org" / "uvrb-mini" / render.BUILD_RECORD).write_text('{"seed": 7}')
    benchmark = render.render_benchmark_card(root / "org" / "uvrb-mini").text
    assert f"| `msrvtt` | MSRVTT | text | recall@1 | {N_VIDEOS} | {N_VIDEOS} |" in benchmark
    assert "python -m dataset_builders.mini uvrb --seed 7\n" in benchmark
    pairs = render.render_training_data_card(root / "org" / "uvrd-mini").text
    assert "| config | train | validation |\n|---|---:|---:|\n| `all` | 4 | 2 |\n| `t2v` | 4 | 2 |\n" in pairs


def test_assembling_adds_the_metrics_and_every_card(root):
    (root / "org" / ".uvrd-mini.tmp").mkdir()  # as a builder that was killed leaves it
    folders = assemble(root, "org", results_dir=root / "results")
    assert {folder.name: repo_type(folder) for folder in folders} == {
        "gve-mini": "model",
        "uvrb-mini": "dataset",
        "uvrb_abilities": "space",
        "uvrb_retrieval": "space",
        "uvrd-mini": "dataset",
    }
    assert ModelCard.load(root / "org" / "gve-mini" / "README.md").data.eval_results
    assert not list(root.glob("org/uvrb_*/__*"))


def test_metrics_carry_the_namespace(tmp_path):
    copy_metric("uvrb_retrieval", tmp_path / "uvrb_retrieval", "me")
    card = (tmp_path / "uvrb_retrieval" / "README.md").read_text()
    assert 'evaluate.load("me/uvrb_retrieval")' in card and "org/uvrb" not in card


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "name, gone, message",
    [
        ("gve-mini", "config.json", "is no repo"),
        ("gve-mini", "model.safetensors", "has no weights"),
        ("uvrb-mini", "msrvtt-corpus", "has no file msrvtt-corpus/test.parquet"),
        ("uvrd-mini", "README.md", "lists no configs"),
    ],
)
def test_a_missing_part_is_named(root, name, gone, message):
    remove(root / "org" / name / gone)
    with pytest.raises(ValueError, match=message):
        render.render_repo(root / "org" / name)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", '{"model_type": "bert"}', "lacks backbone_config"),
        ("config.json", "{", "is not JSON"),
        ("training_run.json", "{}", "training_run.json lacks command, summary, settings"),
        ("results/other.json", "{}", "is no results.json of"),
    ],
)
def test_a_broken_part_is_named(root, file, content, message):
    path = root / "org" / "gve-mini" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        render.render_model_card(root / "org" / "gve-mini")


def test_a_benchmark_without_a_config_of_a_dataset_is_named(root):
    card = root / "org" / "uvrb-mini" / "README.md"
    card.write_text(card.read_text().replace("config_name: ms_ti-top_ranked", "config_name: other"))
    with pytest.raises(ValueError, match="lacks the configs ms_ti-top_ranked"):
        render.render_benchmark_card(card.parent)


def test_unknown_names_and_results_are_one_line(root, capsys):
    with pytest.raises(ValueError, match=r"no folder .*gve-maxi; .* holds gve-mini, uvrb-mini, uvrd-mini"):
        repo_folder(root, "org", "gve-maxi")
    with pytest.raises(ValueError, match="no results.json in"):
        assemble(root, results_dir=root / "nowhere")
    (root / "org" / "uvrb-mini" / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match="front matter cannot be read") as error:
        repo_type(root / "org" / "uvrb-mini")
    assert "\n" not in str(error.value)
