"""The recipe: strict, with one clear error, and a fingerprint of what may change the data."""

from pathlib import Path

import pytest
import yaml

from dataset_builders.synflow import recipe
from dataset_builders.synflow.recipe import PAPER_BUDGETS, RecipeError, load_recipe


RECIPE = {
    "name": "tiny",
    "sources": [{"kind": "rendered", "id": "films", "videos": 8}],
    "captioner": {"url": "http://127.0.0.1:8000/v1", "model": "keye"},
}


def written(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def test_the_default_budgets_are_the_papers(tmp_path):
    defaults = load_recipe(written(tmp_path))
    assert defaults.budgets == PAPER_BUDGETS and sum(PAPER_BUDGETS.values()) == 1_549_000
    assert defaults.profiles == {"spatial": 0.3, "temporal": 0.6, "other": 0.1}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"speed": 3}, "speed"),
        ({"budgets": {"t2x": 3}}, "budgets"),
        ({"profiles": {"spatial": 0.5}}, "add up to 0.5"),
        ({"captioner": {"url": "localhost:8000"}}, "needs url"),
        ({"quality": {"similarity": {"model": "m", "threshold": 0.2, "percentile": 5}}}, "either threshold or"),
        ({"sources": RECIPE["sources"] * 2}, "two sources have one id"),
        ({"name": "../evil"}, "name"),
        ({"captioner": None}, "captioner: is missing"),
        ({"pairs": "raw"}, "pairs: raw ones are captions and their videos: set budgets"),
        ({"sources": [{"kind": "files", "id": "a", "folder": "x"}], "captioner": {"kind": "graph"}}, "scene graphs"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(written(tmp_path, **changes))
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_recipes_are_sound_and_those_compared_share_their_archive():
    folder = Path(recipe.__file__).with_name("recipes")
    shipped = {path.stem: load_recipe(path) for path in folder.glob("*.yaml")}
    compared = [each for name, each in shipped.items() if name.startswith("compared_")]
    assert len(shipped) >= 6 and len(compared) == 3
    assert len({(each.seed, *each.sources) for each in compared}) == 1
    sizes = {each.pairs: sum(each.budgets.values()) for each in compared}
    assert sizes == {"raw": 960, "filtered": 960, "synthesised": 960}


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="absent.yaml: not a readable"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="holds no settings"):
        load_recipe(tmp_path / "list.yaml")


def test_the_fingerprint_changes_with_the_data_alone(tmp_path):
    same = load_recipe(written(tmp_path)).fingerprint
    elsewhere = {**RECIPE["captioner"], "url": "http://10.0.0.1/v1", "concurrency": 3, "requests_per_minute": 9}
    assert load_recipe(written(tmp_path, captioner=elsewhere)).fingerprint == same
    warmer = {**RECIPE["captioner"], "temperature": 0.1}
    assert load_recipe(written(tmp_path, captioner=warmer)).fingerprint != same
    assert load_recipe(written(tmp_path, seed=1)).fingerprint != same
