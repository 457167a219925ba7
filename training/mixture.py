"""What the tasks' shares of the steps explain of the scores, over the finished runs of a sweep.

```bash
python -m training.mixture          # table of training/ablation_results/ablation_mini, also written beside its runs
```

The schedules of a sweep differ in how often they draw each task, and in when. If only how often mattered, a score
would be a function of the shares: here a linear one, by least squares over all runs that differ in nothing but
schedule, prober and seed. A task's slope is what a tenth of the steps brings when it is taken evenly from the others.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from evaluate_metrics.embedding_cache import write_atomically
from hub_cards.repos import run_command
from training.ablation import ABILITIES, RESULTS, SWEEP, read_sweep


# Settings in which runs may differ: how tasks are drawn, and nothing else that is trained.
OF_THE_SCHEDULE = {"schedule", "sampling_alpha", "sigma_min", "sigma_max", "prober", "probe_pairs", "seed"}
OF_THE_SCHEDULE |= {"task_upsampling"}
STEP = 0.1  # share of the steps that a slope is about


def comparable_runs(sweep, folder):
    """Records of a sweep's finished runs on all tasks that differ in how these are drawn."""
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("runs/*.json"))]
    shared = set(sweep["shared"])
    return [each for each in records if set(each["settings"]) <= OF_THE_SCHEDULE | shared]


def fit_shares(shares, scores):
    """Least squares of scores on shares.

    Args:
        shares (`np.ndarray` of shape `(n, K)`): of each run's steps by task; rows sum to 1.
        scores (`np.ndarray` of shape `(n,)`): of the runs.

    Returns:
        `tuple` of slopes `(K,)`, their standard errors `(K,)`, and the share of the variance that is explained
        (`float`), adjusted for the number of tasks.

    Raises:
        ValueError: too few runs.
    """
    count, tasks = shares.shape
    if count <= tasks:
        raise ValueError(f"{count} runs are too few to tell {tasks} tasks apart")
    # Shares sum to 1, so they carry the intercept: a task's coefficient is the score of a run of it alone.
    alone, *_ = np.linalg.lstsq(shares, scores, rcond=None)
    residuals = scores - shares @ alone
    noise = residuals @ residuals / (count - tasks)
    covariance = noise * np.linalg.pinv(shares.T @ shares)
    # A share that a task gains is lost by the others in equal parts.
    moves = STEP * (np.eye(tasks) * tasks - 1) / (tasks - 1)
    errors = np.sqrt(np.einsum("ij,jk,ik->i", moves, covariance, moves))
    return moves @ alone, errors, 1 - noise / scores.var(ddof=1)


def report(sweep, folder):
    """The table as Markdown, also written to `mixture.md` in the sweep's folder."""
    runs = comparable_runs(sweep, folder)
    if not runs:
        raise ValueError(f"no finished runs in {folder}; run python -m training.ablation")
    tasks = list(max((run["batches"] for run in runs), key=len))
    counts = np.array([[run["batches"].get(task, 0) for task in tasks] for run in runs], dtype=np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True)
    columns = [fit_shares(shares, np.array([run["abilities"][ability] for run in runs])) for ability in ABILITIES]
    lines = [
        f"{len(runs)} runs. What {STEP:.0%} of the steps bring, taken evenly from the other tasks (± standard error):",
        "",
        f"| task | share, least to most | {' | '.join(ABILITIES)} |",
        "|---|---|" + "---:|" * len(ABILITIES),
    ]
    for place, task in enumerate(tasks):
        cells = [f"{slopes[place]:+.3f} ± {errors[place]:.3f}" for slopes, errors, _ in columns]
        span = f"{shares[:, place].min():.2f} to {shares[:, place].max():.2f}"
        lines.append(f"| {task} | {span} | {' | '.join(cells)} |")
    explained = " | ".join(f"{share:.0%}" for *_, share in columns)
    lines += [f"| explained variance (adjusted) | | {explained} |", ""]
    text = "\n".join(lines)
    write_atomically(Path(folder) / "mixture.md", lambda file: file.write(text.encode()))
    return text


def main(words=None):
    parser = argparse.ArgumentParser(prog="training.mixture", description="Scores of a sweep by the tasks' shares.")
    parser.add_argument("--sweep", default=str(SWEEP), help="YAML file (default: %(default)s)")
    parser.add_argument("--output", help=f"folder of its results (default: {RESULTS.name}/NAME)")
    arguments = parser.parse_args(words)
    folder = Path(arguments.output or RESULTS / Path(arguments.sweep).stem)
    print(report(read_sweep(arguments.sweep), folder))


if __name__ == "__main__":
    run_command("training.mixture", main)
