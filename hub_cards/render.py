"""Writes the cards of the repos under `build/hub/<namespace>` from what lies in them.

```bash
python -m hub_cards.render                                  # every model and dataset repo of build/hub/org
python -m hub_cards.render --namespace me --repo gve-mini   # one of them
```

A model's card is made of its `config.json`, its weights, what the training run left (`training_run.json`,
`curriculum.png`), `results/*.json` (written by `evaluate_metrics/run_uvrb.py`) and `ablation/summary.md` (by
`training.ablation`; `hub_cards.assemble` puts both there);
a dataset's card of its Parquet files, its build record and the metadata that its builder wrote, which is kept.
V-SynFlow and `collected` write their own cards, of which only the namespace is set; the metrics' are written by hand.
"""

import argparse
import csv
import json
import math
import re
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyarrow import parquet
from safetensors import safe_open

from dataset_builders.uvrb import tasks as uvrb_tasks
from dataset_builders.uvrb.tasks import TASKS, abilities
from evaluate_metrics.report import render_markdown
from hub_cards.repos import METRICS, metadata, repo_folder, repo_names, repo_type, run_command


TRAINING_RECORD = "training_run.json"
CURRICULUM_PLOT = "curriculum.png"
ABLATION, SUMMARY = "ablation", "summary.md"
BUILD_RECORD = "mini.json"
UVRB_RECORD, UVRB_REPORT = "uvrb.json", "report.json"
PAPER = "https://arxiv.org/abs/2510.27571"
SIZE_CATEGORIES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render_model_card(model_dir, namespace="org", name=None):
    """Card of a GVE repo.

    Args:
        model_dir (`str` or `Path`): the repo's folder.
        namespace (`str`): whose repo it is.
        name (`str`, *optional*): the repo's name; default: the folder's.

    Returns:
        `ModelCard`: with the scores as `model-index` where there are any.

    Raises:
        ValueError: a file that the card is made of is missing or broken.
    """
    folder = Path(model_dir)
    name = name or folder.name
    config = _read_json(folder / "config.json")
    for key in ("backbone_config", "num_frames", "max_tokens_per_frame"):
        if key not in config:
            raise ValueError(f"{folder / 'config.json'} lacks {key}; give the folder of a GVE repo")
    record = _training_record(folder / TRAINING_RECORD)
    results = [_results(path, namespace) for path in sorted(folder.glob("results/*.json"))]
    pairs = _hub_name(record["data"]["pairs"] if record else "uvrd-mini", namespace)
    data = ModelCardData(
        model_name=name,
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["gve", "video-retrieval", "multimodal-embedding", "custom_code"],
        datasets=[pairs],
        metrics=[f"{namespace}/{name}" for name in METRICS],
        eval_results=[entry for each in results for entry in _eval_results(each)] or None,
    )
    text = _TEMPLATES.get_template("model.md.j2").render(
        name=name,
        repo=f"{namespace}/{name}",
        namespace=namespace,
        paper=PAPER,
        config=config,
        embedding_dim=config["backbone_config"]["text_config"]["hidden_size"],
        n_parameters=_count_parameters(folder),
        pairs=pairs,
        benchmark=results[0]["benchmark"] if results else f"{namespace}/uvrb-mini",
        results=results,
        record=record,
        ablation=_ablation(folder / ABLATION),
        curriculum=CURRICULUM_PLOT if (folder / CURRICULUM_PLOT).is_file() else None,
    )
    return _card(ModelCard, data, text)


def render_benchmark_card(data_dir, namespace="org"):
    """Card of a benchmark repo in the layout of UVRB; arguments and errors as of `render_training_data_card`."""
    folder = Path(data_dir)
    rows = _rows_by_config(folder)
    tasks = [task for key, task in TASKS.items() if f"{key}-queries" in rows]
    if not tasks:
        raise ValueError(f"{folder / 'README.md'} lists no <key>-queries config; build it with dataset_builders.mini")
    missing = [config for task in tasks for config in task.configs if config not in rows]
    if missing:
        raise ValueError(f"{folder / 'README.md'} lacks the configs {', '.join(missing)}; build the benchmark again")
    data = _dataset_card_data(folder, rows, "UVRB")
    if (folder / UVRB_RECORD).is_file():
        return _card(DatasetCard, data, _uvrb_text(folder, namespace, tasks, rows))
    text = _TEMPLATES.get_template("benchmark.md.j2").render(
        **_dataset_names(folder, namespace), command=_build_command(folder, "uvrb"), tasks=tasks, rows=rows
    )
    return _card(DatasetCard, data, text)


def _uvrb_text(folder, namespace, tasks, rows):
    """Prose of a flavour of UVRB itself, from what its builder left beside the tables."""
    build = _read_json(folder / UVRB_RECORD)
    with open(Path(uvrb_tasks.__file__).with_name("licences.csv"), newline="", encoding="utf-8") as file:
        licences = [row for row in csv.DictReader(file) if set(row["keys"].split()) & {task.key for task in tasks}]
    source = {"release": "build --source FOLDER", "upstream": "build --upstream FILE", "index": "join --index INDEX"}
    return _TEMPLATES.get_template("uvrb.md.j2").render(
        **_dataset_names(folder, namespace),
        build=build,
        report=_read_json(folder / UVRB_REPORT),
        command=f"python -m dataset_builders.uvrb {source[build['source']]} --flavours {build['flavour']}",
        tasks=tasks,
        rows=rows,
        licences=licences,
        abilities=abilities,
    )


def render_training_data_card(data_dir, namespace="org"):
    """Card of a training-pairs repo.

    Args:
        data_dir (`str` or `Path`): the repo's folder with the Parquet files and the README whose `configs` the builder
            wrote; all metadata that stands there is kept.
        namespace (`str`): whose repo it is.

    Returns:
        `DatasetCard`

    Raises:
        ValueError: no configs, or a config without files.
    """
    folder = Path(data_dir)
    rows = _rows_by_config(folder)
    data = _dataset_card_data(folder, rows, "UVRD")
    text = _TEMPLATES.get_template("training_data.md.j2").render(
        **_dataset_names(folder, namespace), command=_build_command(folder, "uvrd"), rows=rows
    )
    return _card(DatasetCard, data, text)


def render_repo(folder, namespace="org"):
    """Write `README.md` of a model or dataset repo; a Space's stays as it is.

    So does that of training pairs which `dataset_builders.mini` did not build, but for the namespace in its calls: its
    builder counted there what it dropped and showed samples.

    Raises:
        ValueError: the folder is no repo, or what its card is made of is missing.
    """
    folder = Path(folder)
    kind = repo_type(folder)
    if kind == "space":
        return
    if kind == "model":
        card = render_model_card(folder, namespace)
    elif any(config.endswith("-qrels") for config in _rows_by_config(folder)):
        card = render_benchmark_card(folder, namespace)
    elif (folder / BUILD_RECORD).is_file():
        card = render_training_data_card(folder, namespace)
    else:
        card = DatasetCard(_named_anew((folder / "README.md").read_text(encoding="utf-8"), folder.name, namespace))
    card.save(folder / "README.md")


def _named_anew(text, name, namespace):
    return re.sub(rf'"[^"/\s]+/{re.escape(name)}"', f'"{namespace}/{name}"', text)


def _card(kind, data, text):
    """A card whose metadata went through YAML and back, so that the library has validated it."""
    return kind(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _training_record(path):
    """What the run says of itself: `command`, `summary` and `settings` by label, `data`; `None` without a record."""
    if not path.is_file():
        return None
    record = _read_json(path)
    missing = [key for key in ("command", "summary", "settings", "data") if key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; train again, or remove it")
    return record


def _ablation(folder):
    """Summary of a sweep and the figures beside it, by study; `None` where there was none."""
    if not (folder / SUMMARY).is_file():
        return None
    figures = {path.stem.replace("_", " "): f"{ABLATION}/{path.name}" for path in sorted(folder.glob("*.png"))}
    return {"summary": (folder / SUMMARY).read_text(encoding="utf-8").strip(), "figures": figures}


def _hub_name(path, namespace):
    """Name on the Hub of a repo given as a folder (`build/hub/org/uvrd-mini`), or by the name of anybody's."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not Path(path).exists()
    return str(path) if named else f"{namespace}/{Path(path).name}"


def _portable(path, namespace):
    """A path as a command on another machine may give it: an absolute one becomes the repo's name on the Hub."""
    return _hub_name(path, namespace) if Path(path).is_absolute() else path


def _count_parameters(folder):
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights (*.safetensors); train the model first")
    count = 0
    for file in files:
        with safe_open(file, framework="numpy") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count


def read_results(path):
    """Results as `evaluate_metrics/run_uvrb.py` writes them.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    results = _read_json(Path(path))
    if not isinstance(results, dict) or results.get("schema") != "gve/uvrb-results":
        raise ValueError(f"{path} is no results.json of evaluate_metrics/run_uvrb.py")
    return results


def _results(path, namespace):
    """Results of one benchmark, with the tables and the command that made them."""
    results = read_results(path)
    benchmark, (model, *baselines) = _hub_name(results["benchmark"], namespace), results["models"]
    words = [f"--model {_portable(model['path'], namespace)} --benchmark {_portable(results['benchmark'], namespace)}"]
    words.append(f"--output build/eval/{model['name']}")
    if baselines:
        words.append(f"--baseline {' '.join(_portable(each['path'], namespace) for each in baselines)}")
    if len(model["datasets"]) < len(TASKS):
        words.append(f"--datasets {' '.join(model['datasets'])}")
    words += _settings(results.get("arguments", {}), namespace)
    radar = path.with_suffix(".png")
    return {
        "benchmark": benchmark,
        "model": model,
        # without its heading, the card has one of its own
        "tables": render_markdown(results | {"benchmark": benchmark}).partition("\n\n")[2],
        "command": " \\\n    ".join(["accelerate launch evaluate_metrics/run_uvrb.py", *words]),
        "radar": f"results/{radar.name}" if radar.is_file() else None,
    }


def _settings(arguments, namespace):
    """The words of a run's command that decide its tables beyond models and datasets."""
    words = [f"--dtype {arguments['dtype']}"] if arguments.get("dtype", "auto") != "auto" else []
    for name in ("num_frames", "max_tokens_per_frame", "truncate_dim", "precision", "classification", "reverse_time"):
        if values := arguments.get(name):
            words.append(f"--{name} {' '.join(_portable(str(value), namespace) for value in values)}")
    return words


def _eval_results(results):
    benchmark = results["benchmark"]
    for key, entry in results["model"]["datasets"].items():
        yield EvalResult(
            task_type="video-retrieval",
            task_name="Video retrieval",
            dataset_type=benchmark,
            dataset_name=f"{TASKS[key].name} ({benchmark})",
            dataset_config=f"{key}-queries",
            dataset_split="test",
            metric_type=entry["metric"].replace("@", "_at_"),
            metric_name=entry["metric"],
            metric_value=round(entry["score"], 4),
        )


def _dataset_names(folder, namespace):
    return {"name": folder.name, "repo": f"{namespace}/{folder.name}", "namespace": namespace, "paper": PAPER}


def _build_command(folder, which):
    """The builder's call, with the settings that it left in the repo."""
    settings = _read_json(folder / BUILD_RECORD) if (folder / BUILD_RECORD).is_file() else {}
    return " ".join(
        ["python -m dataset_builders.mini", which, *(f"--{key} {value}" for key, value in settings.items())]
    )


def _rows_by_config(folder):
    """Rows of each config and split, from the Parquet files that the card's `configs` name."""
    configs = metadata(folder).get("configs")
    if not configs:
        raise ValueError(f"{Path(folder) / 'README.md'} lists no configs; its builder writes them")
    return {
        config["config_name"]: {split: _count_rows(folder, paths) for split, paths in _data_files(config)}
        for config in configs
    }


def _data_files(config):
    """Pairs of a split and its path patterns, from either form that `datasets` allows."""
    files = config["data_files"]
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        pairs = [(entry["split"], entry["path"]) for entry in files]
    else:
        pairs = [("train", files)]
    return [(split, [paths] if isinstance(paths, str) else paths) for split, paths in pairs]


def _count_rows(folder, patterns):
    files = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    if not files:
        raise ValueError(f"{folder} has no file {', '.join(patterns)}, which its README.md lists; build it again")
    return sum(parquet.read_metadata(path).num_rows for path in files)


def _dataset_card_data(folder, rows, family):
    """Metadata of a dataset card: what the builder wrote, completed; the long `configs` come last."""
    known = metadata(folder)
    default = rows.get("default") or rows.get("all") or max(rows.values(), key=lambda splits: sum(splits.values()))
    total = sum(default.values())
    completed = {
        "pretty_name": f"{family} ({folder.name})",
        "language": ["en"],
        "license": "apache-2.0",
        "annotations_creators": ["machine-generated"],
        "task_categories": ["text-retrieval", "feature-extraction"],
        "tags": ["video-retrieval", "gve"],
        "size_categories": [next((name for limit, name in SIZE_CATEGORIES.items() if total < limit), "n>10M")],
    }
    known.pop("size_categories", None)  # counted anew
    return DatasetCardData(**completed | known)


def main(words=None):
    parser = argparse.ArgumentParser(prog="hub_cards.render", description="Writes the cards of assembled repos.")
    parser.add_argument("--root", default="build/hub", help="folder of the namespaces (default: %(default)s)")
    parser.add_argument("--namespace", default="org", help="whose repos (default: %(default)s)")
    parser.add_argument("--repo", nargs="+", help="their names (default: all that lie there)")
    arguments = parser.parse_args(words)
    names = arguments.repo or repo_names(arguments.root, arguments.namespace)
    if not names:
        raise ValueError(f"no repos in {Path(arguments.root) / arguments.namespace}; run make demo first")
    for name in names:
        folder = repo_folder(arguments.root, arguments.namespace, name)
        render_repo(folder, arguments.namespace)
        print(folder / "README.md")


if __name__ == "__main__":
    run_command("hub_cards.render", main)
