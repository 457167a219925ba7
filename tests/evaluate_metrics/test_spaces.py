"""Both metric folders as a Space holds them: loaded by `evaluate`, alone, with card, cases and doctests."""

import doctest
import importlib
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import evaluate
import pytest
import yaml


FOLDER = Path(__file__).parents[2] / "evaluate_metrics"
METRICS = ("uvrb_retrieval", "uvrb_abilities")
NUMBERS = (
    "uvrb_retrieval.ranking",
    *(f"uvrb_abilities.{module}" for module in ("averages", "correlations", "printed", "published")),
)


@pytest.fixture(scope="module", params=METRICS)
def metric(request, tmp_path_factory):
    return evaluate.load(str(FOLDER / request.param), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.mark.filterwarnings("ignore:Partial coverage")
def test_cases_of_the_space(metric):
    for case in runpy.run_path(FOLDER / metric.name / "tests.py")["test_cases"]:
        result = metric.compute(**case["inputs"])
        assert {name: result[name] for name in case["result"]} == pytest.approx(case["result"], abs=1e-12)


def test_doctests_of_the_module(metric):
    with patch("evaluate.load", lambda name: metric):
        outcome = doctest.testmod(sys.modules[type(metric).__module__])
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.parametrize("name", NUMBERS)
def test_doctests_of_the_numbers(name):
    outcome = doctest.testmod(importlib.import_module(f"evaluate_metrics.{name}"))
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_import_alone(name):
    """As inside a Space: no package around, and neither evaluate nor torch behind."""
    folder, module = name.split(".")
    code = f"import sys, {module}; print({{'evaluate', 'datasets', 'torch', 'evaluate_metrics'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=FOLDER / folder, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", METRICS)
def test_files_of_the_space(name):
    folder = FOLDER / name
    _, card, text = (folder / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(card)
    assert fields["title"] == name and fields["sdk"] == "gradio" and fields["app_file"] == "app.py"
    assert fields["license"] == "apache-2.0" and "metric" in fields["tags"]
    assert f'evaluate.load("org/{name}")' in text
    assert "TODO" not in text
    assert {"app.py", "requirements.txt", "tests.py", f"{name}.py"} <= {path.name for path in folder.iterdir()}


@pytest.fixture
def page(request, monkeypatch):
    """Names of a Space's `app.py`, as run in its own folder."""
    pytest.importorskip("gradio")
    folder = FOLDER / request.param
    monkeypatch.syspath_prepend(str(folder))
    yield runpy.run_path(folder / "app.py")
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", ["uvrb_retrieval"], indirect=True)
def test_page_scores_ranked_ids(page):
    import gradio

    scores = page["score"](*page["EXAMPLE"])
    assert scores["recall@1"] == 0.25 and scores["mrr"] == pytest.approx(0.75)
    with pytest.raises(gradio.Error):
        page["score"]("no list", "[]", "1")


@pytest.mark.parametrize("page", ["uvrb_abilities"], indirect=True)
def test_page_compares_with_published_models(page):
    import gradio

    table, note = page["compare"]('{"ms_ti": 0.2, "ms_tv": 0.4}', ["GVE-7B"])
    cells = {row[0]: row[1:] for row in table["data"]}
    assert cells["CMP"][0] == "0.300" and float(cells["CMP"][1]) == pytest.approx(0.3115, abs=0.0006)
    assert cells["TXT"][0] == "" and "2 of 16" in note
    matrix = page["correlate"]("spearman")
    assert matrix["data"][0][1] == "1.000"
    with pytest.raises(gradio.Error):
        page["compare"]("[1, 2]", [])
