"""Holds the runner against an unmodified mteb: the same model on the same benchmark, dataset by dataset.

```bash
apt-get install ffmpeg && pip install -e ".[judge-video]"   # mteb decodes videos with torchcodec, that with FFmpeg
python -m evaluate_metrics.mteb_parity --model build/hub/org/gve-mini --benchmark build/hub/org/uvrb-mini \\
    --results build/eval/gve-mini/results.json
```

mteb rounds its scores to five decimals; the runner's are rounded likewise before they are compared. Exit code 1 says
that one differs by more than 1e-6.
"""

import argparse
import json
import sys
from pathlib import Path

import mteb

from dataset_builders.uvrb.mteb_uvrb import uvrb_benchmark
from dataset_builders.uvrb.tasks import get_tasks
from modeling_gve.mteb_gve import gve_meta


MTEB_DECIMALS = 5
TOLERANCE = 1e-6


def mteb_scores(model, benchmark, keys):
    """Scores of a GVE repo by an unmodified mteb.

    Args:
        model (`str`): folder or Hub name.
        benchmark (`str`): folder or Hub name.
        keys (iterable of `str`): datasets.

    Returns:
        `dict[str, float]`: each dataset's metric by key.
    """
    tasks = uvrb_benchmark(benchmark, keys=keys).tasks
    meta = gve_meta(model, dtype="float32")
    results = mteb.evaluate(meta, tasks, cache=None, co2_tracker=False).task_results
    scores = {result.task_name: result.get_score() for result in results}
    return {task.hf_subsets[0]: scores[task.metadata.name] for task in tasks}


def compare(theirs, ours):
    """Rows `(key, mteb's score, the runner's, difference after mteb's rounding)`."""
    return [(key, theirs[key], ours[key], abs(theirs[key] - round(ours[key], MTEB_DECIMALS))) for key in theirs]


def main(words=None):
    parser = argparse.ArgumentParser(prog="evaluate_metrics.mteb_parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="GVE repo, as given to the runner; its code is run")
    parser.add_argument("--benchmark", required=True, help="repo of the benchmark, as given to the runner")
    parser.add_argument("--results", required=True, help="results.json of the runner, with --dtype float32")
    parser.add_argument("--datasets", nargs="+", metavar="KEY", help="default: all that the results hold")
    arguments = parser.parse_args(words)
    try:
        judged = json.loads(Path(arguments.results).read_text())["models"][0]["datasets"]
        keys = [task.key for task in get_tasks(arguments.datasets or judged)]
        ours = {key: judged[key]["score"] for key in keys}
    except (OSError, ValueError, KeyError) as error:
        print(f"evaluate_metrics.mteb_parity: cannot compare with {arguments.results}: {error}", file=sys.stderr)
        return 2
    rows = compare(mteb_scores(arguments.model, arguments.benchmark, keys), ours)
    print("| dataset | mteb | runner | difference |\n|---|---:|---:|---:|")
    for key, theirs, own, difference in rows:
        print(f"| {key} | {theirs:.5f} | {own:.7f} | {difference:.0e} |")
    return int(max(row[-1] for row in rows) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
