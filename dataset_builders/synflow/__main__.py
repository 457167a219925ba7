"""Makes a dataset from a recipe.

```bash
python -m dataset_builders.synflow RECIPE --plan                  # what it will take; nothing is run
python -m dataset_builders.synflow RECIPE --tasks 2               # on this machine
python -m dataset_builders.synflow RECIPE --executor slurm --tasks 64
python -m dataset_builders.synflow RECIPE --status                # how far it is, and what it has paid
```

Killed at any moment, the same command goes on where it stopped; answers that were paid for are never asked again.
"""

import argparse
import sys

import datasets
from datatrove.pipeline.inference.types import InferenceError

from dataset_builders.synflow.captioning import CaptionerError
from dataset_builders.synflow.documents import count_dropped
from dataset_builders.synflow.engine import (
    is_complete,
    paid_line,
    parts_done,
    run,
    spent,
    step_seconds,
    work_folder,
)
from dataset_builders.synflow.pairing import BudgetError
from dataset_builders.synflow.plan import forecast
from dataset_builders.synflow.recipe import RecipeError, load_recipe
from dataset_builders.synflow.sources import read_index


def report(recipe, work):
    """What was dropped, took time and was paid, a line each."""
    lines = [f"dropped {number:>8,}  {stage}: {reason}" for (stage, reason), number in count_dropped(work).items()]
    lines += [
        f"seconds {seconds:>8.1f}  {stage}: {step}"
        for (stage, step), seconds in step_seconds(work).items()
        if seconds >= 0.1
    ]
    cost = spent(work)
    if cost["requests"]:
        lines.append(f"paid    {paid_line(recipe.captioner, cost)}")
    return "\n".join(lines)


def status(recipe, work):
    """How far a run is, wherever it runs.

    Raises:
        RecipeError: it was not started.
    """
    parts = read_index(recipe, work)
    if parts is None:
        raise RecipeError(f"{work}: no run of this recipe; start it first, or name its folder with --root")
    lines = [f"done    {done:>8,}  {stage}" for stage, done in parts_done(work).items()]
    return "\n".join([f"parts   {parts:>8,}", *lines, report(recipe, work)])


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m dataset_builders.synflow", description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="YAML file; examples lie in dataset_builders/synflow/recipes")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--tasks", type=int, default=1, help="parts that run at once (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="forecast videos, requests, tokens, GB and hours")
    parser.add_argument("--status", action="store_true", help="how far a run is, what it dropped and paid so far")
    parser.add_argument(
        "--sample", type=int, default=24, help="videos a task that --plan times (default: %(default)s)"
    )
    parser.add_argument("--root", default="build/synflow", help="folder of runs (default: %(default)s)")
    parser.add_argument("--output", help="folder of the dataset (default: build/hub/org/<name>)")
    parser.add_argument("--store", help="folder of paid answers (default: <root>/answers)")
    arguments = parser.parse_args(words)
    if arguments.tasks < 1 or arguments.sample < 1:
        parser.error("--tasks and --sample: give at least 1")
    datasets.disable_progress_bars()
    try:
        recipe = load_recipe(arguments.recipe)
        if arguments.plan:
            print(forecast(recipe, arguments.tasks, arguments.sample, arguments.executor))
            return 0
        if arguments.status:
            print(status(recipe, work_folder(arguments.root, recipe)))
            return 0
        places = {"root": arguments.root, "output": arguments.output, "store": arguments.store}
        output = run(recipe, **places, executor=arguments.executor, tasks=arguments.tasks)
    except (RecipeError, BudgetError, CaptionerError, InferenceError, RuntimeError) as error:
        if not isinstance(error, RecipeError):
            print(report(recipe, work_folder(arguments.root, recipe)), file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(recipe, work_folder(arguments.root, recipe)))
    if is_complete(recipe, output):
        print(f"wrote {output}")
    else:
        print(f"submitted; the jobs will write {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
