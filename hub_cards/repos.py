"""What the folders under `build/hub/<namespace>` are: which repos there are, and of which type each is."""

import sys
from pathlib import Path

from huggingface_hub import RepoCard


METRICS = ("uvrb_retrieval", "uvrb_abilities")
# Never pushed: a run's checkpoints and caches, and what Python or an editor leaves.
IGNORED = ("run/*", "__pycache__/*", "*/__pycache__/*", "*.tmp", ".DS_Store")


def repo_folder(root, namespace, name):
    """Folder of a repo.

    Raises:
        ValueError: there is none; the message names those that are there.
    """
    folder = Path(root) / namespace / name
    if not folder.is_dir():
        present = ", ".join(repo_names(root, namespace)) or "nothing"
        raise ValueError(f"no folder {folder}; {folder.parent} holds {present}")
    return folder


def repo_names(root, namespace):
    """Names of the repos under a namespace, sorted; what a builder has not finished starts with a dot and is none."""
    parent = Path(root) / namespace
    if not parent.is_dir():
        return []
    return sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def metadata(folder):
    """Metadata of a repo's card, `{}` without one.

    Raises:
        ValueError: the card's front matter cannot be read.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return {}
    try:
        return RepoCard.load(path).data.to_dict()
    except Exception as error:  # YAML's own errors and the library's
        raise ValueError(f"{path}: the front matter cannot be read: {' '.join(str(error).split())}") from error


def repo_type(folder):
    """Type of the repo in a folder, from what it holds: `"model"`, `"dataset"` or `"space"`.

    Raises:
        ValueError: it is none of them.
    """
    folder = Path(folder)
    card = metadata(folder)
    if "sdk" in card:
        return "space"
    if (folder / "config.json").is_file():
        return "model"
    if "configs" in card or any(folder.rglob("*.parquet")):
        return "dataset"
    raise ValueError(f"{folder} is no repo: it has neither a config.json, nor Parquet files, nor a card with an sdk")


def run_command(program, main):
    """Call `main()`; what the caller can put right ends in one line and exit code 2.

    Args:
        program (`str`): starts the line.
        main (`Callable`): raises `ValueError` or `OSError` on such a thing.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
