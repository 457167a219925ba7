"""Loads the published repos as a user does, in a process that knows nothing of this project, and searches with them.

```bash
python -m hub_cards.prove                      # the folders of build/hub/org
python -m hub_cards.prove --base me            # the repos of a namespace on the Hub
python -m hub_cards.prove --text "two circles collide" --dataset crb_t
```

This file imports nothing of the project. Called as above it starts itself again with `python -I` (no PYTHONPATH, no
current folder on the import path) in an empty folder and with an empty cache; the second process also hides the
project's packages, which an editable install would leave importable, and checks that they are gone.
"""

import argparse
import builtins
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


PROJECT = ("modeling_gve", "hub_cards", "dataset_builders", "evaluate_metrics", "training")
CHECKOUT = Path(__file__).resolve().parents[1]


def locate(base, name):
    """Where a user finds a repo: the absolute path of a folder, else its name on the Hub.

    Raises:
        ValueError: `base` is a path and has no such folder.
    """
    folder = Path(base, name)
    if folder.is_dir():
        return str(folder.resolve())
    if not re.fullmatch(r"[\w-]+", base) or Path(base).is_dir():
        raise ValueError(f"no folder {folder}; assemble the repos first (make demo), or give --base a Hub namespace")
    return f"{base}/{name}"


def forget_project():
    """Make the project's packages unimportable here, and check it.

    Raises:
        RuntimeError: one of them can still be found.
    """
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != CHECKOUT]
    sys.modules.update(dict.fromkeys(PROJECT))  # None stops an import before any finder is asked
    found = [name for name in PROJECT if importlib.util.find_spec(name) is not None]
    if found or Path.cwd().resolve().is_relative_to(CHECKOUT):
        raise RuntimeError(f"the proof sees the project: {', '.join(found) or Path.cwd()}")


def refuse_questions():
    """Let nothing ask on the terminal, but keep the question: transformers swallows the errors of some answers.

    Returns:
        `list[str]`: the questions asked so far, filled as they come.
    """
    asked = []
    builtins.input = lambda question="": asked.append(question) or ""
    return asked


def step(call, action, describe):
    """Run one call of a user; print it, what it gave and how long it took.

    Args:
        call (`str`): as the user writes it.
        action (`Callable`): does it.
        describe (`Callable`): one line on its result.

    Raises:
        ValueError: it failed; one line with the call and the reason.
    """
    print(call, flush=True)
    start = time.perf_counter()
    try:
        result = action()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{call} failed: {reason}") from error
    print(f"    {describe(result)} ({time.perf_counter() - start:.1f} s)", flush=True)
    return result


def load_model(path):
    from transformers import AutoModel

    def describe(model):
        size = sum(parameter.numel() for parameter in model.parameters())
        return f"{type(model).__name__} of {size:,} parameters, embeddings of {model.config.embedding_dim} dimensions"

    call = f'AutoModel.from_pretrained("{path}", trust_remote_code=True)'
    return step(call, lambda: AutoModel.from_pretrained(path, trust_remote_code=True), describe)


def load_rows(path, config, split):
    """`load_dataset` with its media undecoded; `config=None` is the default config."""
    from datasets import Image, Video, load_dataset

    def action():
        rows = load_dataset(path, config, split=split)
        for name, feature in rows.features.items():
            if isinstance(feature, (Image, Video)):
                rows = rows.cast_column(name, type(feature)(decode=False))
        return rows

    named = f'"{path}", "{config}"' if config else f'"{path}"'
    call = f'load_dataset({named}, split="{split}")'
    return step(call, action, lambda rows: f"{len(rows):,} rows: {', '.join(rows.column_names)}")


def stream_first_row(path, split):
    """The default config without downloading or converting it whole."""
    from datasets import load_dataset

    call = f'load_dataset("{path}", split="{split}", streaming=True)'
    rows = step(call, lambda: load_dataset(path, split=split, streaming=True), lambda rows: type(rows).__name__)
    return step("    next(iter(...))", lambda: next(iter(rows.decode(False))), lambda row: ", ".join(row))


def load_metric(path):
    import evaluate

    return step(f'evaluate.load("{path}")', lambda: evaluate.load(path), lambda metric: type(metric).__name__)


def choose_query(queries, dataset, text):
    """The first text query of a dataset of the benchmark, or the user's own text under its instruction.

    Returns:
        `dict`: `text`, `instruction` and `relevant_ids` (empty for an own text).

    Raises:
        ValueError: the dataset has no text query; the message names those that have.
    """
    kinds = queries.select_columns(["dataset", "text", "image", "video"]).to_pandas()
    textual = kinds[kinds["text"].notna() & kinds["image"].isna() & kinds["video"].isna()]
    of_dataset = textual.index[textual["dataset"] == dataset]
    if not len(of_dataset):
        raise ValueError(
            f"{dataset} has no text queries; choose --dataset from {', '.join(textual['dataset'].unique())}"
        )
    row = queries[int(of_dataset[0])]
    return {**row, "text": text, "relevant_ids": []} if text else row


def search(model, query, corpus, name):
    """Rank the corpus for a text; print the five best with their cosines, and where the right ones stand.

    Returns:
        `list[str]`: ids of the corpus, best first.
    """
    import torch

    wanted = model.encode([query["text"]], instruction=query["instruction"])
    videos = model.encode([{"video": video} for video in corpus["video"]], show_progress_bar=True)
    norms = torch.cat([wanted, videos]).norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        raise ValueError(f"embeddings have norms from {norms.min():.3f} to {norms.max():.3f} instead of 1")
    scores = model.similarity(wanted, videos)[0]
    order = scores.argsort(descending=True).tolist()
    ids, right = corpus["id"], set(query["relevant_ids"])
    print(f'\n"{query["text"]}"\namong {len(order)} videos of {name}:')
    for rank, place in enumerate(order, start=1):
        if rank <= 5 or ids[place] in right:
            mark = "  <- the right one" if ids[place] in right else ""
            print(f"{rank:>6}  {scores[place]:.3f}  {ids[place]}{mark}")
    print(flush=True)
    return [ids[place] for place in order]


def prove(paths, dataset, text):
    """All calls in turn; see the module."""
    import datasets

    datasets.disable_progress_bars()
    questions = refuse_questions()
    model = load_model(paths["model"])
    queries = load_rows(paths["benchmark"], None, "test")
    query = choose_query(queries, dataset, text)
    corpus = load_rows(paths["benchmark"], f"{dataset}-corpus", "test")
    stream_first_row(paths["pairs"], "train")
    load_rows(paths["pairs"], "t2v", "validation")
    ranked = search(model, query, corpus, f"{dataset}-corpus")
    if questions:
        raise ValueError(f"the model asked the user, who had trusted its code: {questions[0].splitlines()[0]}")
    retrieval, abilities = load_metric(paths["retrieval"]), load_metric(paths["abilities"])
    if query["relevant_ids"]:
        scores = retrieval.compute(predictions=[ranked], references=[query["relevant_ids"]], k=[1, 10])
        print(f"    this query: recall@1 {scores['recall@1']:g}, recall@10 {scores['recall@10']:g}")
    published = abilities.compute(scores=abilities.published_scores["GVE-7B"])
    print(f"    GVE-7B as published: {published['avg_abilities']:.3f} over abilities")
    forget_project()  # still so after everything has been loaded
    print("\nproved: the model, both datasets and both metrics load and work without this project")


def start_isolated(words, paths):
    """Run this file again in a process that cannot see the project; returns its exit code."""
    from huggingface_hub import get_token

    with tempfile.TemporaryDirectory(prefix="gve-proof-") as folder:
        # the user's caches would hide a file that is missing from a repo
        caches = re.compile(r"HF_\w*CACHE|TRANSFORMERS_CACHE|HUGGINGFACE_HUB_CACHE")
        env = {name: value for name, value in os.environ.items() if not caches.fullmatch(name)}
        token = get_token()  # lies in HF_HOME, unless it is HF_TOKEN
        env |= {"HF_HOME": f"{folder}/cache"} | ({"HF_TOKEN": token} if token else {})
        command = [sys.executable, "-I", str(Path(__file__).resolve()), *words, "--isolated", *paths.values()]
        return subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, check=False).returncode


def main(words=None):
    parser = argparse.ArgumentParser(prog="hub_cards.prove", description="Loads the published repos as a user does.")
    parser.add_argument("--base", default="build/hub/org", help="folder of the repos, or a namespace on the Hub")
    parser.add_argument("--model", default="gve-mini", help="model repo (default: %(default)s)")
    parser.add_argument("--benchmark", default="uvrb-mini", help="benchmark repo (default: %(default)s)")
    parser.add_argument("--pairs", default="uvrd-mini", help="training-pairs repo (default: %(default)s)")
    parser.add_argument(
        "--dataset", default="msrvtt", help="dataset of the benchmark to search (default: %(default)s)"
    )
    parser.add_argument("--text", help="search for this (default: the dataset's first query)")
    parser.add_argument("--isolated", nargs=5, help=argparse.SUPPRESS)  # set by start_isolated: the five located repos
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    names = {"model": arguments.model, "benchmark": arguments.benchmark, "pairs": arguments.pairs}
    names |= {"retrieval": "uvrb_retrieval", "abilities": "uvrb_abilities"}
    try:
        if arguments.isolated is None:
            sys.exit(start_isolated(words, {kind: locate(arguments.base, name) for kind, name in names.items()}))
        forget_project()
        prove(dict(zip(names, arguments.isolated)), arguments.dataset, arguments.text)
    except ValueError as error:
        print(f"hub_cards.prove: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
