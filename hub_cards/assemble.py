"""Completes `build/hub/<namespace>` so that each folder in it is a repo ready to be pushed.

```bash
python -m hub_cards.assemble --model gve-mini --results build/eval/gve-mini \
    --ablation training/ablation_results/ablation_mini
```

The model and the two dataset repos lie there already: training and the builders write to these folders. This adds the
metric repos, the results of `evaluate_metrics/run_uvrb.py` and `training.ablation` beside the model, and every card.
"""

import argparse
import shutil
from pathlib import Path

import evaluate_metrics
from hub_cards.render import ABLATION, SUMMARY, read_results, render_repo
from hub_cards.repos import METRICS, repo_folder, repo_names, run_command


NOT_IN_A_SPACE = ("__init__.py", "__pycache__")  # a Space's files import each other as they lie, flat


def copy_metric(name, folder, namespace="org"):
    """Lay out a metric's Space: its files, with the namespace in its card.

    Args:
        name (`str`): a folder of `evaluate_metrics`.
        folder (`Path`): the repo; replaced if it is there.
        namespace (`str`): whose repo it will be.
    """
    source = Path(evaluate_metrics.__file__).parent / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*NOT_IN_A_SPACE))
    for file in (folder / "README.md", folder / f"{name}.py"):
        file.write_text(file.read_text(encoding="utf-8").replace('"org/', f'"{namespace}/'), encoding="utf-8")


def add_results(results_dir, model_dir):
    """Copy a run's results and radar plot beside the model, named after the benchmark.

    They go to a sub-folder: what lies at the top of a model's folder is part of the model.

    Raises:
        ValueError: `results_dir` holds no results.
    """
    source, target = Path(results_dir), Path(model_dir) / "results"
    if not (source / "results.json").is_file():
        raise ValueError(f"no results.json in {source}; run evaluate_metrics/run_uvrb.py with --output {source}")
    benchmark = Path(read_results(source / "results.json")["benchmark"]).name
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "results.json", target / f"{benchmark}.json")
    if (source / "radar.png").is_file():
        shutil.copyfile(source / "radar.png", target / f"{benchmark}.png")
    else:
        (target / f"{benchmark}.png").unlink(missing_ok=True)  # of earlier results


def add_ablation(ablation_dir, model_dir):
    """Copy a sweep's summary and figures beside the model that its recipe makes.

    Raises:
        ValueError: `ablation_dir` holds none.
    """
    source, target = Path(ablation_dir), Path(model_dir) / ABLATION
    if not (source / SUMMARY).is_file():
        raise ValueError(f"no {SUMMARY} in {source}; run python -m training.ablation --report")
    target.mkdir(exist_ok=True)
    for path in (source / SUMMARY, *source.glob("*.png")):
        shutil.copyfile(path, target / path.name)


def assemble(root, namespace="org", model="gve-mini", results_dir=None, ablation_dir=None):
    """Add what is missing and write all cards.

    Args:
        root (`str` or `Path`): folder of the namespaces.
        namespace (`str`): whose repos.
        model (`str`): name of the model repo that the results belong to.
        results_dir (`str` or `Path`, *optional*): output folder of `run_uvrb.py`.
        ablation_dir (`str` or `Path`, *optional*): output folder of `training.ablation`.

    Returns:
        `list[Path]`: the repos.

    Raises:
        ValueError: no such model, no results, or a folder that is no repo.
    """
    if results_dir is not None:
        add_results(results_dir, repo_folder(root, namespace, model))
    if ablation_dir is not None:
        add_ablation(ablation_dir, repo_folder(root, namespace, model))
    for name in METRICS:
        copy_metric(name, Path(root) / namespace / name, namespace)
    folders = [repo_folder(root, namespace, name) for name in repo_names(root, namespace)]
    for folder in folders:
        render_repo(folder, namespace)
    return folders


def main(words=None):
    parser = argparse.ArgumentParser(prog="hub_cards.assemble", description="Adds metric repos, results and cards.")
    parser.add_argument("--root", default="build/hub", help="folder of the namespaces (default: %(default)s)")
    parser.add_argument("--namespace", default="org", help="whose repos (default: %(default)s)")
    parser.add_argument("--model", default="gve-mini", help="repo that the results belong to (default: %(default)s)")
    parser.add_argument("--results", help="output folder of evaluate_metrics/run_uvrb.py")
    parser.add_argument("--ablation", help="output folder of training.ablation with the model's recipe")
    arguments = parser.parse_args(words)
    places = arguments.results, arguments.ablation
    for folder in assemble(arguments.root, arguments.namespace, arguments.model, *places):
        print(folder)


if __name__ == "__main__":
    run_command("hub_cards.assemble", main)
