"""What can go wrong before and while pushing ends in one clear line, and nothing is pushed halfway."""

from pathlib import Path

import pytest


pytest_plugins = ["hub_fixtures"]
CHECKOUT = {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "hub" / "org" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny")
    return tmp_path / "hub"


def publish(run_client, root, *words, **options):
    words = ["-m", "hub_cards.publish", "--root", root, "--namespace", "org", *words]
    return run_client(words, env=CHECKOUT, **options)


@pytest.mark.parametrize(
    "words, options, message",
    [
        ((), {"token": "hf_wrong"}, "refuses the token; run hf auth login or set HF_TOKEN"),
        ((), {"token": None}, "no token; run hf auth login or set HF_TOKEN"),
        (("--repo", "tony"), {}, "tony; {root}/org holds tiny"),
        (
            ("--namespace", "nobody"),
            {},
            "no repos in {root}/nobody; after make demo: cp -r {root}/org {root}/nobody &&",
        ),
    ],
)
def test_refusals_are_one_line(hub, root, run_client, words, options, message):
    done = publish(run_client, root, *words, **options, code=2)
    assert message.format(root=root) in done.stderr
    assert done.stderr.startswith("hub_cards.publish: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_foreign_namespace_is_refused_before_pushing(hub, root, run_client):
    (root / "org").rename(root / "nobody")
    done = publish(run_client, root, "--namespace", "nobody", code=2)
    assert "tester may not push to nobody; choose one of tester, org" in done.stderr


def test_no_repo_is_pushed_when_one_cannot_be(hub, root, run_client):
    (root / "org" / "zero").mkdir()
    done = publish(run_client, root, code=2)
    assert "zero is no repo" in done.stderr
    (root / "org" / "zero" / "config.json").write_text("{}")
    done = publish(run_client, root, code=2)
    assert "zero has no README.md; run python -m hub_cards.render first" in done.stderr
    assert not [entry for entry in hub.log if "/repos/create" in entry[1]]


def test_a_private_repo_is_hidden_from_strangers(hub, root, run_client):
    publish(run_client, root, "--private")
    look = "from huggingface_hub import HfApi; print(HfApi().repo_exists('org/tiny'))"
    assert run_client(["-c", look]).stdout == "True\n"
    assert run_client(["-c", look], token=None).stdout == "False\n"
