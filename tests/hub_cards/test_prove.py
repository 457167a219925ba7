"""The proof hides the project, finds folders and names, and says in one line what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hub_cards import prove


CHECKOUT = Path(__file__).parents[2]


def test_a_repo_is_a_folder_or_a_name(tmp_path):
    (tmp_path / "org" / "gve-mini").mkdir(parents=True)
    assert prove.locate(str(tmp_path / "org"), "gve-mini") == str((tmp_path / "org" / "gve-mini").resolve())
    assert prove.locate("me", "gve-mini") == "me/gve-mini"
    with pytest.raises(ValueError, match=r"no folder .*uvrb-mini; assemble the repos first"):
        prove.locate(str(tmp_path / "org"), "uvrb-mini")


def test_the_project_is_hidden_even_where_it_is_on_the_path(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
import hub_cards.prove as prove
prove.forget_project()
for name in prove.PROJECT:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert "the proof sees the project" in done.stderr


def test_a_failing_call_is_one_line(capsys):
    def fails():
        raise OSError("first line\nsecond line")

    with pytest.raises(ValueError, match=r'^load\("x"\) failed: first line$'):
        prove.step('load("x")', fails, str)
    assert capsys.readouterr().out == 'load("x")\n'


def test_questions_are_kept(monkeypatch):
    monkeypatch.setattr("builtins.input", input)  # restored afterwards
    asked = prove.refuse_questions()
    assert input("trust it?") == "" and asked == ["trust it?"]


def test_only_text_queries_are_searched():
    empty = {"image": None, "video": None}
    rows = [
        {
            "dataset": "i2v",
            "text": None,
            "image": "picture",
            "video": None,
            "instruction": "a",
            "relevant_ids": ["v1"],
        },
        {"dataset": "t2v", "text": "first", **empty, "instruction": "b", "relevant_ids": ["v2"]},
        {"dataset": "t2v", "text": "second", **empty, "instruction": "b", "relevant_ids": ["v3"]},
    ]
    queries = Dataset.from_list(rows)
    assert prove.choose_query(queries, "t2v", None)["relevant_ids"] == ["v2"]
    own = prove.choose_query(queries, "t2v", "my words")
    assert (own["text"], own["instruction"], own["relevant_ids"]) == ("my words", "b", [])
    with pytest.raises(ValueError, match="i2v has no text queries; choose --dataset from t2v"):
        prove.choose_query(queries, "i2v", None)


def test_a_missing_repo_ends_in_one_line(tmp_path):
    command = [sys.executable, prove.__file__, "--base", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("hub_cards.prove: no folder ") and done.stderr.count("\n") == 1
