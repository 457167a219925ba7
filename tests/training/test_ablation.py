"""Sweeps: equal runs once, what is finished is kept, and statistics by hand."""

import json
import threading
from pathlib import Path

import pytest
import yaml

from training import ablation
from training.arguments import parse_arguments


RUNS = {
    "a": {1: 0.1, 2: 0.2, 3: 0.3},
    "b": {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.9},
}


def record(score):
    return {"abilities": dict.fromkeys(ablation.ABILITIES, score)}


def test_statistics_by_hand():
    found = ablation.compare(RUNS["b"], RUNS["a"])
    assert (found["mean"], found["seeds"]) == (pytest.approx(0.45), 4)
    assert found["difference"] == pytest.approx(0.1)  # of 0.1, 0.2 and 0; seed 4 has no partner
    # t = 0.1 / (0.1 / sqrt 3) = 1.732 with two degrees of freedom
    assert found["p"] == pytest.approx(0.2254, abs=1e-4)
    assert found["deviation"] == pytest.approx(0.3109, abs=1e-4)
    assert ablation.compare({1: 0.5}, {1: 0.5}) == {
        "mean": 0.5,
        "deviation": None,
        "seeds": 1,
        "difference": 0.0,
        "p": None,
    }
    assert ablation.compare({}, {1: 0.5})["mean"] is None


@pytest.fixture
def sweep(tmp_path):
    content = {
        "recipe": "training/recipes/gve_mini.yaml",
        "benchmark": "somewhere",
        "shared": {"steps_per_epoch": 2},
        "studies": {
            "one": {
                "seeds": [1, 2],
                "reference": "plain",
                "arms": {"plain": {}, "reversed": {"schedule": "reversed"}},
            },
            "two": {"seeds": [1], "reference": "same", "arms": {"same": None, "other": {"probe_pairs": 4}}},
        },
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sweep_goes_on_where_it_stopped(sweep, tmp_path, monkeypatch, capsys):
    trained = []

    def run(sweep, name, settings, output, work, threads):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(settings)
        (output / "runs").mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(settings["seed"] / 10 + settings.get("probe_pairs", 0))).encode()
        # the report on the run before may be reading at this moment
        ablation.write_atomically(output / "runs" / f"{name}.json", lambda file: file.write(text))

    monkeypatch.setattr(ablation, "run", run)
    words = ["--sweep", str(sweep), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(KeyboardInterrupt):
        ablation.main(words)
    assert len(trained) == 3
    first, trained[:] = list(trained), []
    ablation.main(words)
    together = [tuple(sorted(settings.items())) for settings in first + trained]
    # Five, not six: the arm `same` is the arm `plain`.
    assert len(together) == len(set(together)) == 5
    assert "| plain | 2 | 0.150 ± 0.071 |" in (tmp_path / "out/results.md").read_text()
    summary = capsys.readouterr().out
    assert (
        "| one | plain (reference) | 2 | 0.150 ± 0.071 |  |  |\n| one | reversed | 2 | 0.150 ± 0.071 | +0.000 |  |"
        in summary
    )
    assert "| two | other | 1 | 4.100 | +4.000 |  |" in summary
    assert summary.strip() == (tmp_path / "out/summary.md").read_text().strip()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["two"]["other"]["TXT"]["difference"] == pytest.approx(4)
    assert (tmp_path / "out/one.png").stat().st_size > 1000
    ablation.main([*words, "--study", "two"])
    assert len(trained) == 2 and "| one | plain" in capsys.readouterr().out  # one study alone keeps the others


def test_two_jobs_share_the_cores(sweep, tmp_path, monkeypatch):
    together = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(ablation, "available_cores", lambda: 8)

    def run(sweep, name, settings, output, work, threads):
        assert threads == 4
        if settings.get("probe_pairs") is None:  # the fifth run has no partner
            together.wait()
        text = json.dumps(record(0.5)).encode()
        ablation.write_atomically(output / "runs" / f"{name}.json", lambda file: file.write(text))

    monkeypatch.setattr(ablation, "run", run)
    ablation.main(["--sweep", str(sweep), "--output", str(tmp_path), "--work", str(tmp_path), "--jobs", "2"])
    assert len(list((tmp_path / "runs").iterdir())) == 5


def test_every_arm_of_the_shipped_sweep_is_a_valid_recipe(tmp_path):
    sweep = ablation.read_sweep(ablation.SWEEP)
    recipe = yaml.safe_load((ablation.ROOT / sweep["recipe"]).read_text())
    runs = ablation.planned_runs(sweep, sweep["studies"])
    for settings in runs.values():
        path = Path(tmp_path) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | settings))
        parse_arguments(["--config", str(path)])
    assert len(sweep["studies"]["schedule"]["seeds"]) == len(sweep["studies"]["data_and_curriculum"]["seeds"]) == 5


def test_mistakes_in_a_sweep(sweep, tmp_path):
    with pytest.raises(ValueError, match="no study three in .*: it has one, two"):
        ablation.main(["--sweep", str(sweep), "--study", "three", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="--jobs must be from 1 to"):
        ablation.main(["--sweep", str(sweep), "--jobs", "0", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="cannot read the sweep"):
        ablation.read_sweep(tmp_path / "none.yaml")
    content = yaml.safe_load(sweep.read_text())
    content["studies"]["two"]["reference"] = "missing"
    sweep.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="reference 'missing' of study two is none of its arms"):
        ablation.read_sweep(sweep)


def test_small_p_are_not_zero():
    assert [ablation.format_p(p) for p in (0.5, 0.0051, 0.0013)] == ["0.50", "0.01", "0.001"]
