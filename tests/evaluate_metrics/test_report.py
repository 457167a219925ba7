"""Tables and radar."""

import pytest
from PIL import Image

from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.html_report import correlation_cells, render_html
from evaluate_metrics.report import draw_radar, render_markdown
from evaluate_metrics.uvrb_abilities.averages import ability_scores
from evaluate_metrics.uvrb_abilities.published import published_scores


def results(*names, keys=tuple(TASKS), skipped=()):
    """Results as the runner assembles them, from published scores."""
    models = [{"name": name, "datasets": {}} for name in names]
    for model in models:
        scores = {key: published_scores()[model["name"]][key] for key in keys}
        model["abilities"] = ability_scores(scores)
        for key, score in scores.items():
            model["datasets"][key] = {
                "metric": TASKS[key].metric,
                "score": score,
                "n_queries": TASKS[key].n_query,
                "n_ranked": float(TASKS[key].n_corpus),
                "skipped": {"corpus": list(skipped), "queries": []},
            }
    chance = {key: TASKS[key].k / TASKS[key].n_corpus for key in keys}
    chance = {"datasets": chance, "abilities": ability_scores(chance)}
    return {"benchmark": "org/uvrb", "models": models, "chance": chance}


def table_rows(text, first):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in line] for line in lines]


def test_table_has_16_datasets_9_abilities_and_both_averages():
    text = render_markdown(results("GVE-7B", "GVE-3B"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 16 + 2 + 9 + 2
    assert len({len(line) for line in lines[:18]}) == 1 and len({len(line) for line in lines[18:]}) == 1
    cells = "cmrb|TXT FG T|recall@10|0.398|0.363|0.009|728|1071|0".split("|")
    assert table_rows(text, "cmrb ") == [cells]
    assert table_rows(text, "avg_a")[0] == ["avg_abilities", "average over abilities", "0.599", "0.571", "0.018"]
    assert "Partial" not in text and "Skipped" not in text


def test_what_is_missing_or_skipped_stands_below_the_table():
    text = render_markdown(results("GVE-7B", keys=["ms_ti"], skipped=[{"id": "v9", "reason": "no frames"}]))
    assert table_rows(text, "CMP  ")[0][2] == "-"
    assert "Partial coverage: 1 of 16 datasets" in text
    assert "- GVE-7B: ms_ti corpus v9: no frames" in text


def test_radar_is_a_picture_that_changes_with_the_scores(tmp_path):
    curves = {model["name"]: model["abilities"] for model in results("GVE-7B", "CLIP4Clip")["models"]}
    for name, drawn in (("both", curves), ("again", curves), ("one", {"GVE-7B": curves["GVE-7B"]})):
        draw_radar(drawn, tmp_path / f"{name}.png")
    both, again, one = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("both", "again", "one"))
    assert min(both.size) > 800
    assert both.tobytes() == again.tobytes() != one.tobytes()


def test_radar_of_partial_coverage(tmp_path):
    keys = [key for key, task in TASKS.items() if task.domain == "FG"]
    draw_radar({"GVE-7B": results("GVE-7B", keys=keys)["models"][0]["abilities"]}, tmp_path / "radar.png")
    composed = results("GVE-7B", keys=["ms_ti", "ms_tv"])["models"][0]["abilities"]
    with pytest.raises(ValueError, match="three abilities or more, these scores cover 1"):
        draw_radar({"GVE-7B": composed}, tmp_path / "x.png")


def test_only_scores_on_the_published_benchmark_enter_the_correlations():
    judged = results("GVE-7B", "GVE-3B") | {"arguments": {}, "environment": {}}
    for model in judged["models"]:
        for entry in model["datasets"].values():
            entry |= {"interval": [0, 1], "misses": []}
    page = render_html(judged, {})
    assert "Over 17 models, the published ones and GVE-7B:" in page and "does not compare" not in page
    judged["models"][0]["datasets"]["msrvtt"]["n_queries"] = 50
    page = render_html(judged, {})
    assert "Over 16 models, the published ones alone:" in page and "do not compare" in page
    partial = results("GVE-7B", keys=["ms_ti"])["models"][0]
    assert correlation_cells(partial) == correlation_cells()
