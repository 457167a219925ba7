"""Scores a model on the 16 datasets of UVRB: a table, its abilities and a radar plot.

```bash
# one process; a second call goes on where the first one stopped
accelerate launch evaluate_metrics/run_uvrb.py \
    --model build/hub/org/gve-mini --benchmark build/hub/org/uvrb-mini --output build/eval/gve-mini

# beside other models, and on some datasets only
accelerate launch evaluate_metrics/run_uvrb.py \
    --model build/hub/org/gve-mini --benchmark build/hub/org/uvrb-mini --output build/eval/gve-mini \
    --baseline build/gve-mini-base random --datasets msrvtt crb_t ms_ti

# two CPU processes
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 evaluate_metrics/run_uvrb.py ...
```

The output folder gets `results.json` (its schema is in this folder's README), `results.md`, `radar.png`, and what a
resumed run needs: `datasets/` (a result for each finished dataset) and `embeddings/`. The protocol is the paper's
(arXiv 2510.27571): the query carries its dataset's instruction, the corpus carries none, cosine, no reranking.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from tqdm import tqdm
from transformers import HfArgumentParser

from dataset_builders.uvrb.tasks import get_tasks
from evaluate_metrics.encoders import GVEEncoder, RandomEncoder, embed, write_atomically
from evaluate_metrics.report import draw_radar, render_markdown
from evaluate_metrics.retrieval_data import UvrbError, config_names, load_retrieval_data
from evaluate_metrics.uvrb_abilities.averages import ABILITIES, ability_scores
from evaluate_metrics.uvrb_retrieval.ranking import chance_level, mean_scores, ranks_from_embeddings


SCHEMA_VERSION = 1
CUTOFFS = (1, 5, 10)


@dataclass
class RunArguments:
    """What to score, on what, and where the results go."""

    model: str = field(metadata={"help": "Folder of a GVE repo, or its name on the Hub. Its code is run."})
    benchmark: str = field(metadata={"help": "Folder of a benchmark repo, or its name on the Hub."})
    output: str = field(metadata={"help": "Folder of the results."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Dataset keys; all 16 by default."})
    baseline: list[str] | None = field(
        default=None, metadata={"help": "Models shown beside the first: folders, names on the Hub, or `random`."}
    )
    batch_size: int = field(default=32, metadata={"help": "Items a forward pass on one process."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights: auto (as saved), float32, bfloat16, float16."}
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise UvrbError(f"batch_size is {self.batch_size}; give a whole number from 1.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UvrbError(f"dtype is {self.dtype!r}; choose auto, float32, bfloat16 or float16.")
        try:
            get_tasks(self.datasets)
        except ValueError as error:
            raise UvrbError(str(error)) from error


def main():
    """Command line; what the caller can put right ends in one line and exit code 2."""
    try:
        (args,) = HfArgumentParser(RunArguments).parse_args_into_dataclasses()
        datasets.disable_progress_bars()
        results = run(args)
    except UvrbError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"run_uvrb: {error}", file=sys.stderr)
        sys.exit(2)
    if results is not None:
        print(f"\n{render_markdown(results)}\nResults: {Path(args.output)}")


def run(args):
    """Scores the model and its baselines, and writes everything.

    Args:
        args (`RunArguments`): as on the command line.

    Returns:
        `dict` as in `results.json` on the main process, `None` on the others.

    Raises:
        UvrbError: no model or benchmark there, or one that does not fit.
    """
    accelerator = _start_processes()
    encoders = _open_encoders(args, accelerator)
    data = _load_data(args, accelerator)
    scores = [_score_model(encoder, data, Path(args.output), accelerator) for encoder in encoders]
    if not accelerator.is_main_process:
        return None
    results = _assemble(args, encoders, data, scores)
    _write_reports(results, Path(args.output))
    return results


def score_embeddings(data, queries, corpus):
    """One dataset's entry of the results, but for the skipped items.

    Args:
        data (`RetrievalData`): relevance and candidates.
        queries (`numpy.ndarray` of shape `(Q, D)`): NaN rows count as misses.
        corpus (`numpy.ndarray` of shape `(N, D)`): NaN rows are never retrieved.

    Returns:
        `dict`: `metric`, `score`, `chance`, `n_queries`, `n_corpus`, `n_ranked`, `scores`.
    """
    ids = (data.queries.ids, data.corpus.ids)
    ranks = ranks_from_embeddings(queries, corpus, *ids, data.relevant, data.candidates)
    scores = mean_scores(ranks, {*CUTOFFS, data.task.k})
    return {
        "metric": data.task.metric,
        "score": scores[data.task.metric],
        "chance": chance_level(data.task.metric, data.n_relevant, data.n_ranked),
        "n_queries": len(data.queries),
        "n_corpus": len(data.corpus),
        "n_ranked": sum(data.n_ranked) / len(data.queries),
        "scores": scores,
    }


def _start_processes():
    # The processes meet after each side of a dataset: the default of 10 minutes would end a long one.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UvrbError(f"{started} processes were started, each on its own: on a CPU set ACCELERATE_USE_CPU=true.")
    return accelerator


def _open_encoders(args, accelerator):
    encoders = []
    with accelerator.main_process_first():
        for path in (args.model, *(args.baseline or ())):
            name = Path(path).name
            taken = any(name == encoder.name for encoder in encoders)
            if path == "random":
                encoders.append(RandomEncoder())
            else:
                encoders.append(
                    GVEEncoder(path if taken else name, path, accelerator.device, args.dtype, args.batch_size)
                )
    return encoders


def _load_data(args, accelerator):
    """All datasets before any embedding, so that a missing one is known at once."""
    tasks = get_tasks(args.datasets)
    with accelerator.main_process_first():
        present = config_names(args.benchmark)
        missing = [config for task in tasks for config in task.configs if config not in present]
        if missing:
            raise UvrbError(
                f"The benchmark at {args.benchmark} lacks {', '.join(missing)}; rebuild it or use --datasets."
            )
        bar = tqdm(tasks, desc="reading the benchmark", unit="dataset", disable=not accelerator.is_main_process)
        return [load_retrieval_data(args.benchmark, task) for task in bar]


def _score_model(encoder, data, output, accelerator):
    """Entries of all datasets by key, on the main process; finished ones are taken from the output folder."""
    entries = {}
    total = sum(len(part.corpus) + len(part.queries) for part in data)
    with tqdm(total=total, desc=encoder.name, unit="item", disable=not accelerator.is_main_process) as progress:
        for part in data:
            progress.set_description(f"{encoder.name} {part.task.key}")
            entries[part.task.key] = _score_dataset(encoder, part, output, accelerator, progress)
    encoder.release()
    return entries


def _score_dataset(encoder, data, output, accelerator, progress):
    inputs = _inputs_hash(encoder, data) if accelerator.is_main_process else None
    path = output / "datasets" / f"{data.task.key}-{encoder.fingerprint[:12]}.json"
    entry = _read_finished(path, inputs) if accelerator.is_main_process else None
    if broadcast_object_list([entry is not None])[0]:
        progress.update(len(data.corpus) + len(data.queries))
        return entry
    cache = output / "embeddings"
    corpus = embed(encoder, data.corpus, None, cache, accelerator, progress)
    queries = embed(encoder, data.queries, data.task.instruction, cache, accelerator, progress)
    if not accelerator.is_main_process:
        return None
    entry = {
        **score_embeddings(data, queries[0], corpus[0]),
        "skipped": {"corpus": _named(corpus[1], data.corpus), "queries": _named(queries[1], data.queries)},
        "inputs": inputs,
    }
    _write_json(path, entry)
    return entry


def _inputs_hash(encoder, data):
    """Hash of all that decides a dataset's entry: the model, the content, the ids and the rules."""
    rules = [SCHEMA_VERSION, CUTOFFS, data.task.metric, data.task.instruction]
    sides = [[side.digest, side.ids] for side in (data.corpus, data.queries)]
    content = json.dumps([encoder.fingerprint, rules, sides, data.relevant, data.candidates], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_finished(path, inputs):
    if not path.is_file():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    return entry if entry["inputs"] == inputs else None


def _named(skipped, side):
    return [{"id": side.ids[entry["index"]], "reason": entry["reason"]} for entry in skipped]


def _assemble(args, encoders, data, scores):
    chance = {part.task.key: scores[0][part.task.key]["chance"] for part in data}
    models = [
        {
            "name": encoder.name,
            "path": encoder.path,
            "role": "baseline" if place else "model",
            "fingerprint": encoder.fingerprint,
            "abilities": ability_scores({key: entry["score"] for key, entry in entries.items()}),
            "datasets": entries,
        }
        for place, (encoder, entries) in enumerate(zip(encoders, scores))
    ]
    return {
        "schema": "gve/uvrb-results",
        "schema_version": SCHEMA_VERSION,
        "benchmark": args.benchmark,
        "models": models,
        "chance": {"datasets": chance, "abilities": ability_scores(chance)},
    }


def _write_reports(results, output):
    _write_json(output / "results.json", results)
    write_atomically(output / "results.md", lambda file: file.write(render_markdown(results).encode()))
    curves = {model["name"]: model["abilities"] for model in results["models"]}
    covered = [name for name in ABILITIES if results["models"][0]["abilities"][name] is not None]
    if len(covered) >= 3:  # fewer make no area to look at
        draw_radar({**curves, "chance": results["chance"]["abilities"]}, output / "radar.png")


def _write_json(path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    main()
