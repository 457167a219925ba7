"""How fast the flow is without a captioner, where its time goes, and how far the plan is off.

```bash
python -m dataset_builders.synflow.benchmark --videos 300 --tasks 2
python -m dataset_builders.synflow.benchmark --recipe dataset_builders/synflow/recipes/rendered.yaml
```

The videos are rendered before the clock starts, so that decoding them is measured and not drawing them; captions come
from the scene graphs in-process, and their seconds are left out of the throughput.
"""

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets

from dataset_builders.synflow.engine import run, step_seconds, work_folder
from dataset_builders.synflow.plan import forecast
from dataset_builders.synflow.recipe import Recipe, RecipeError, load_recipe
from dataset_builders.synflow.sources import list_videos, video_file


ASKING = ("caption", "compose")  # stages that a captioner's speed decides


def throughput(videos, tasks, root):
    """Videos a second from decoding to Parquet.

    Args:
        videos (`int`): rendered ones, a tenth of them bad.
        tasks (`int`): parts that run at once.
        root (`Path`): scratch space.

    Returns:
        `tuple` of videos a second and `{step: share of the seconds of all tasks}`.
    """
    recipe = Recipe(
        name="benchmark",
        sources=[{"kind": "rendered", "id": "films", "videos": videos, "faults": 0.1}],
        part_size=max(1, videos // (4 * tasks)),
        captioner={"kind": "graph"},
        quality={"similarity": {"model": "graph", "threshold": 0.6}},
        composition={"text_alone_rank": 0},  # among few videos a word often tells one
    )
    work, clock = work_folder(root, recipe), {}
    for document in list_videos(recipe, work):
        video_file(recipe, work, document)
    run(recipe, root=root, output=root / "data", tasks=tasks, clock=clock)
    seconds = sum(time for stage, time in clock.items() if stage not in ASKING)
    steps = {f"{stage}: {step}": time for (stage, step), time in step_seconds(work).items() if stage not in ASKING}
    total = sum(steps.values())
    return videos / seconds, {step: time / total for step, time in steps.items()}


def compare(recipe, tasks, root, sample):
    """The plan's seconds beside the measured ones: `{stage: (forecast, measured)}` and of all stages together.

    The plan is made in a process of its own, as for a user: what it loads, the run has to load again.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        planned, clock = pool.submit(forecast, recipe, tasks, sample).result().seconds, {}
    run(recipe, root=root, output=root / "data", tasks=tasks, clock=clock)
    table = {stage: (planned.get(stage, 0.0), seconds) for stage, seconds in clock.items()}
    return {**table, "all": (sum(planned.values()), sum(clock.values()))}


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m dataset_builders.synflow.benchmark", description=__doc__[:75])
    parser.add_argument("--videos", type=int, default=300, help="of the throughput (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=1, help="parts that run at once (default: %(default)s)")
    parser.add_argument("--recipe", help="compare the plan of this recipe with a run of it instead")
    parser.add_argument("--sample", type=int, default=24, help="videos that the plan looks at (default: %(default)s)")
    arguments = parser.parse_args(words)
    if min(arguments.videos, arguments.tasks, arguments.sample) < 1:
        parser.error("--videos, --tasks and --sample: give at least 1")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        try:
            if arguments.recipe:
                table = compare(load_recipe(arguments.recipe), arguments.tasks, root, arguments.sample)
                for stage, (planned, measured) in table.items():
                    print(f"{stage:<10} forecast {planned:8.1f} s, measured {measured:8.1f} s")
                print(f"the forecast is off by {table['all'][0] / table['all'][1] - 1:+.0%}")
                return 0
            rate, shares = throughput(arguments.videos, arguments.tasks, root)
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"{rate:.1f} videos a second without captioner, {arguments.tasks} tasks")
    for step, share in sorted(shares.items(), key=lambda item: -item[1]):
        if share >= 0.001:
            print(f"{share:6.1%}  {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
