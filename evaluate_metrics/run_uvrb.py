"""Scores a model on the 16 datasets of UVRB: a table, its abilities and a radar plot.

```bash
# one process; a second call goes on where the first one stopped
accelerate launch evaluate_metrics/run_uvrb.py \
    --model build/hub/org/gve-mini --benchmark build/hub/org/uvrb-mini --output build/eval/gve-mini

# beside other models, and on some datasets only
accelerate launch evaluate_metrics/run_uvrb.py \
    --model build/hub/org/gve-mini --benchmark build/hub/org/uvrb-mini --output build/eval/gve-mini \
    --baseline training/gve-mini-base random --datasets msrvtt crb_t ms_ti

# two CPU processes
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 evaluate_metrics/run_uvrb.py ...

# test-time scaling: every combination; the first one is the model's score, all are in the report
accelerate launch evaluate_metrics/run_uvrb.py ... --num_frames 8 16 48 --max_tokens_per_frame 200 400 \
    --truncate_dim 2048 256 --precision float32 int8 ubinary

# diagnostics: class labels by retrieval, and whether a text prefers its clip over the clip's reversal
accelerate launch evaluate_metrics/run_uvrb.py ... --classification org/ucf101 --reverse_time crb_t cmrb
```

The output folder gets `results.json` (its schema is in this folder's README), `results.md`, `report.html`,
`radar.png`, and what a resumed run needs: `datasets/` (a result for each finished dataset) and `embeddings/`. The
protocol is the paper's (arXiv 2510.27571): the query carries its dataset's instruction, the corpus carries none,
cosine, no reranking.
"""

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from tqdm import tqdm
from transformers import HfArgumentParser

from dataset_builders.uvrb.tasks import get_tasks
from evaluate_metrics.diagnostics import clip_sides, load_classification, score_reverse_time
from evaluate_metrics.embedding_cache import embed, write_atomically
from evaluate_metrics.encoders import NUM_FRAMES, GVEEncoder, open_encoder
from evaluate_metrics.html_report import render_html
from evaluate_metrics.report import draw_radar, render_markdown
from evaluate_metrics.retrieval_data import UvrbError, config_names, load_retrieval_data
from evaluate_metrics.settings import Setting, bytes_per_vector, reduce_embeddings, sweep
from evaluate_metrics.uvrb_abilities.averages import ABILITIES, ability_scores
from evaluate_metrics.uvrb_retrieval.ranking import (
    bootstrap_intervals,
    chance_level,
    ranks_from_embeddings,
    scores_by_query,
    top_k,
)


SCHEMA_VERSION = 2
CUTOFFS = (1, 5, 10)
N_MISSES = 3  # worst misses that a dataset's entry names
LIBRARIES = ("torch", "transformers", "datasets", "numpy", "accelerate")


@dataclass
class RunArguments:
    """What to score, on what, and where the results go."""

    model: str = field(
        metadata={
            "help": "Folder or Hub name of a GVE repo or a sentence-transformers model, sentence-transformers:PATH or "
            "mteb:NAME. Its code is run."
        }
    )
    benchmark: str = field(metadata={"help": "Folder of a benchmark repo, or its name on the Hub."})
    output: str = field(metadata={"help": "Folder of the results."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Dataset keys; all 16 by default."})
    baseline: list[str] | None = field(
        default=None, metadata={"help": "Models shown beside the first: as for --model, or `random`."}
    )
    batch_size: int = field(default=32, metadata={"help": "Items a forward pass on one process."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights: auto (as saved), float32, bfloat16, float16."}
    )
    num_frames: list[int] | None = field(
        default=None, metadata={"help": "Frames of a video. This and the next three: several values make a sweep."}
    )
    max_tokens_per_frame: list[int] | None = field(
        default=None, metadata={"help": "A frame gets fewer visual tokens than this."}
    )
    truncate_dim: list[int] | None = field(default=None, metadata={"help": "Leading dimensions kept of a vector."})
    precision: list[str] | None = field(
        default=None, metadata={"help": "Of the vectors: float32 (default), bfloat16, int8, ubinary."}
    )
    vision_memory: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps what the vision tower made of each medium, for models that share one, such as "
            "the runs of a sweep. GVE models on CPUs."
        },
    )
    classification: list[str] | None = field(
        default=None, metadata={"help": "Dataset repos with columns video and label, scored as label retrieval."}
    )
    reverse_time: list[str] | None = field(
        default=None, metadata={"help": "Keys among the datasets for which clips are compared with their reversals."}
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise UvrbError(f"batch_size is {self.batch_size}; give a whole number from 1.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UvrbError(f"dtype is {self.dtype!r}; choose auto, float32, bfloat16 or float16.")
        _ = self.settings
        try:
            scored = {task.key for task in get_tasks(self.datasets)}
        except ValueError as error:
            raise UvrbError(str(error)) from error
        unknown = sorted(set(self.reverse_time or ()) - scored)
        if unknown:
            raise UvrbError(f"reverse_time names {', '.join(unknown)}, which is not scored; choose from --datasets.")

    @property
    def settings(self) -> list[Setting]:
        """The sweep; its first setting is the one that abilities and tables are about."""
        return sweep(self.num_frames, self.max_tokens_per_frame, self.truncate_dim, self.precision)


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
    output, settings = Path(args.output), args.settings
    if accelerator.is_main_process:
        _remove_half_files(output)
    encoders = _open_encoders(args, accelerator)
    data, classification = _load_data(args, accelerator)
    models = [_score_model(encoders[0], settings, data, classification, args, accelerator)]
    # Baselines read the same frames and keep whole vectors.
    plain = Setting(settings[0].num_frames, settings[0].max_tokens_per_frame)
    models += [_score_model(encoder, [plain], data, classification, args, accelerator) for encoder in encoders[1:]]
    if not accelerator.is_main_process:
        return None
    results = _assemble(args, encoders, data, models, accelerator)
    _write_reports(results, {part.task.key: part for part in data}, output)
    return results


def score_embeddings(data, queries, corpus):
    """One dataset's entry of the results, but for the skipped items.

    Args:
        data (`RetrievalData`): relevance and candidates.
        queries (`numpy.ndarray` of shape `(Q, D)`): NaN rows count as misses.
        corpus (`numpy.ndarray` of shape `(N, D)`): NaN rows are never retrieved.

    Returns:
        `dict`: `metric`, `score`, `interval`, `chance`, `n_queries`, `n_corpus`, `n_ranked`, `scores`, `misses`.
    """
    ids = (data.queries.ids, data.corpus.ids)
    ranks = ranks_from_embeddings(queries, corpus, *ids, data.relevant, data.candidates)
    by_query = scores_by_query(ranks, {*CUTOFFS, data.task.k})
    scores = {name: float(values.mean()) for name, values in by_query.items()}
    metric = data.task.metric
    return {
        "metric": metric,
        "score": scores[metric],
        "interval": list(bootstrap_intervals({metric: by_query[metric]})[metric]),
        "chance": chance_level(metric, data.n_relevant, data.n_ranked),
        "n_queries": len(data.queries),
        "n_corpus": len(data.corpus),
        "n_ranked": sum(data.n_ranked) / len(data.queries),
        "scores": scores,
        "misses": worst_misses(data, queries, corpus, ranks),
    }


def worst_misses(data, queries, corpus, ranks):
    """The queries whose best relevant video stands furthest down, below the metric's cut-off, worst first.

    Args:
        data (`RetrievalData`): relevance and candidates.
        queries, corpus (`numpy.ndarray` of shapes `(Q, D)` and `(N, D)`): embeddings.
        ranks (list of Q `numpy.ndarray`): of the relevant videos, in the order of the corpus.

    Returns:
        list of at most `N_MISSES` `{"query", "relevant", "rank", "retrieved"}`: ids of the query, of its best relevant
        video and of the video that was ranked first. Queries without any rank are not examples of a misjudgement.
    """
    best = np.array([row.min() for row in ranks])
    order = np.argsort(-np.where(np.isfinite(best), best, 0), kind="stable")[:N_MISSES]
    rows = [int(row) for row in order if data.task.k < best[row] < np.inf]
    row_of = {name: row for row, name in enumerate(data.corpus.ids)}
    names = [data.queries.ids[row] for row in rows]
    candidates = None if data.candidates is None else [[row_of[n] for n in data.candidates[name]] for name in names]
    first = top_k(queries[rows], corpus, 1, candidates)[0][:, 0] if rows else []
    misses = []
    for row, name, retrieved in zip(rows, names, first):
        relevant = sorted(set(data.relevant[name]), key=row_of.get)[int(ranks[row].argmin())]
        misses.append(
            {
                "query": name,
                "relevant": relevant,
                "rank": int(best[row]),
                "retrieved": data.corpus.ids[int(retrieved)],
            }
        )
    return misses


def _start_processes():
    # The processes meet after each side of a dataset: the default of 10 minutes would end a long one.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UvrbError(f"{started} processes were started, each on its own: on a CPU set ACCELERATE_USE_CPU=true.")
    return accelerator


def _remove_half_files(output):
    """What a killed run was writing."""
    for folder in (output, output / "datasets", output / "embeddings"):
        for path in folder.glob("*.tmp"):
            path.unlink()


def _open_encoders(args, accelerator):
    encoders = []
    with accelerator.main_process_first():
        for path in (args.model, *(args.baseline or ())):
            encoder = open_encoder(path, accelerator.device, args.dtype, args.batch_size)
            if isinstance(encoder, GVEEncoder):
                encoder.vision_memory = args.vision_memory
            if any(encoder.name == other.name for other in encoders):
                encoder.name = path
            encoders.append(encoder)
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
        classification = [load_classification(repo) for repo in args.classification or ()]
        bar = tqdm(tasks, desc="reading the benchmark", unit="dataset", disable=not accelerator.is_main_process)
        data = [load_retrieval_data(args.benchmark, task) for task in bar]
    keys = [part.task.key for part in (*data, *classification)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UvrbError(f"Two datasets are called {', '.join(twice)}; rename the classification set.")
    return data, classification


def _score_model(encoder, settings, data, classification, args, accelerator):
    """What the results say of one model, on the main process; finished datasets are taken from the output folder."""
    output, sides = Path(args.output), [*data, *classification]
    total = len(settings) * sum(len(part.corpus) + len(part.queries) for part in sides)
    runs = []
    with tqdm(total=total, desc=encoder.name, unit="item", disable=not accelerator.is_main_process) as progress:
        for setting in settings:
            encoder.limit(setting.limits)
            entries = {}
            for part in sides if setting == settings[0] else data:
                progress.set_description(f"{encoder.name} {part.task.key}")
                entries[part.task.key] = _score_dataset(encoder, setting, part, output, accelerator, progress)
            runs.append(entries)
        encoder.limit(settings[0].limits)
        reverse_time = {
            part.task.key: _score_reverse_time(encoder, settings[0], part, output, accelerator, progress)
            for part in data
            if part.task.key in (args.reverse_time or ())
        }
    encoder.release()
    return {"runs": runs, "settings": settings, "reverse_time": reverse_time}


def _score_dataset(encoder, setting, data, output, accelerator, progress):
    inputs = _inputs_hash(encoder, setting, data) if accelerator.is_main_process else None
    name = "-".join([data.task.key, encoder.fingerprint[:12], *(f"{v}" for v in setting.changes.values())])
    path = output / "datasets" / f"{name}.json"
    entry = _read_finished(path, inputs) if accelerator.is_main_process else None
    if broadcast_object_list([entry is not None])[0]:
        progress.update(len(data.corpus) + len(data.queries))
        return entry
    cache = output / "embeddings"
    corpus = embed(encoder, data.corpus, None, cache, accelerator, progress)
    queries = embed(encoder, data.queries, data.task.instruction, cache, accelerator, progress)
    if not accelerator.is_main_process:
        return None
    vectors = [reduce_embeddings(side[0], setting) for side in (queries, corpus)]
    entry = {
        **score_embeddings(data, *vectors),
        "bytes_per_vector": bytes_per_vector(corpus[0].shape[1], setting),
        "skipped": {"corpus": _named(corpus[1], data.corpus), "queries": _named(queries[1], data.queries)},
        "inputs": inputs,
    }
    _write_json(path, entry)
    return entry


def _score_reverse_time(encoder, setting, data, output, accelerator, progress):
    """Whole vectors, whatever the setting's precision: the question is what the model sees."""
    cache = output / "embeddings"
    forward, reversed_, rows = clip_sides(data, setting.num_frames or NUM_FRAMES)
    progress.total += len(forward) + len(reversed_) + len(data.queries)
    progress.set_description(f"{encoder.name} {data.task.key} reversed")
    sides = [embed(encoder, side, None, cache, accelerator, progress) for side in (forward, reversed_)]
    queries = embed(encoder, data.queries, data.task.instruction, cache, accelerator, progress)
    if not accelerator.is_main_process:
        return None
    return score_reverse_time(queries[0], sides[0][0], sides[1][0], rows)


def _inputs_hash(encoder, setting, data):
    """Hash of all that decides a dataset's entry: the model, the content, the ids and the rules."""
    rules = [SCHEMA_VERSION, CUTOFFS, N_MISSES, data.task.metric, data.task.instruction]
    sides = [[side.digests, side.ids] for side in (data.corpus, data.queries)]
    model = [encoder.fingerprint, asdict(setting)]
    content = json.dumps([model, rules, sides, data.relevant, data.candidates], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_finished(path, inputs):
    if not path.is_file():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    return entry if entry["inputs"] == inputs else None


def _named(skipped, side):
    return [{"id": side.ids[entry["index"]], "reason": entry["reason"]} for entry in skipped]


def _assemble(args, encoders, data, models, accelerator):
    keys = [part.task.key for part in data]
    described = [
        {
            "name": encoder.name,
            "path": encoder.path,
            "role": "baseline" if place else "model",
            "fingerprint": encoder.fingerprint,
            "setting": asdict(model["settings"][0]),
            **_describe_run(model["runs"][0], keys),
            "classification": {key: entry for key, entry in model["runs"][0].items() if key not in keys},
            "reverse_time": model["reverse_time"],
        }
        for place, (encoder, model) in enumerate(zip(encoders, models))
    ]
    chance = {key: described[0]["datasets"][key]["chance"] for key in keys}
    swept = list(zip(models[0]["settings"], models[0]["runs"])) if len(models[0]["runs"]) > 1 else []
    return {
        "schema": "gve/uvrb-results",
        "schema_version": SCHEMA_VERSION,
        "benchmark": args.benchmark,
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
            "device": accelerator.device.type,
        },
        "models": described,
        "sweep": [{"setting": asdict(setting), **_describe_run(run, keys)} for setting, run in swept],
        "chance": {"datasets": chance, "abilities": ability_scores(chance)},
    }


def _describe_run(entries, keys):
    scores = {key: entries[key]["score"] for key in keys}
    return {"abilities": ability_scores(scores), "datasets": {key: entries[key] for key in keys}}


def _write_reports(results, data, output):
    _write_json(output / "results.json", results)
    write_atomically(output / "results.md", lambda file: file.write(render_markdown(results).encode()))
    curves = {model["name"]: model["abilities"] for model in results["models"]}
    covered = [name for name in ABILITIES if results["models"][0]["abilities"][name] is not None]
    radar = output / "radar.png" if len(covered) >= 3 else None  # fewer make no area to look at
    if radar is not None:
        curves["chance"] = results["chance"]["abilities"]
        write_atomically(radar, lambda file: draw_radar(curves, file))
    else:
        (output / "radar.png").unlink(missing_ok=True)  # an earlier run's
    page = render_html(results, data, radar)
    write_atomically(output / "report.html", lambda file: file.write(page.encode()))


def _write_json(path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    main()
