"""Tiny repos in the project's layout: a random GVE model, a benchmark and training pairs of a few real videos."""

import json

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value, Video
from rendering import draw_frames, write_video

from dataset_builders.uvrb.tasks import TASKS, abilities
from evaluate_metrics.uvrb_abilities.averages import ability_scores


KEYS = ("msrvtt", "ms_ti")
N_VIDEOS = 6
STRING = Value("string")
MEDIA = {"text": STRING, "image": Image(), "video": Video()}
QUERY = {"id": STRING, **MEDIA}
QUERY_ROW = {
    **QUERY,
    "dataset": STRING,
    "instruction": STRING,
    "abilities": List(STRING),
    "relevant_ids": List(STRING),
    "candidate_ids": List(STRING),
}
PAIR = {
    **{f"query_{name}": feature for name, feature in MEDIA.items()},
    **{f"target_{name}": feature for name, feature in MEDIA.items()},
    "negatives": List(MEDIA),
    "instruction": STRING,
    "task": STRING,
    "source_id": STRING,
}


def write_model(folder, model, processor):
    """A GVE repo with the record of a training run and, under `run/`, what must never be pushed."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "run").mkdir()
    (folder / "run" / "optimizer.bin").write_bytes(b"checkpoint")


def write_benchmark(folder, videos):
    """Two datasets of UVRB, one with texts and one with composed queries and candidates, and the default config."""
    rows, features = {"default": []}, {"default": QUERY_ROW}
    ids = [f"v{number}" for number in range(N_VIDEOS)]
    for task in (TASKS[key] for key in KEYS):
        image = np.zeros((8, 8, 3), dtype=np.uint8) if "image" in task.query_modality else None
        queries = [{"id": f"q{n}", "text": f"{n} {task.key}", "image": image, "video": None} for n in range(N_VIDEOS)]
        rows[f"{task.key}-corpus"] = [
            {"id": name, "text": None, "image": None, "video": video} for name, video in zip(ids, videos)
        ]
        rows[f"{task.key}-queries"] = queries
        rows[f"{task.key}-qrels"] = [{"query-id": f"q{n}", "corpus-id": ids[n], "score": 1} for n in range(N_VIDEOS)]
        features |= {f"{task.key}-{side}": QUERY for side in ("corpus", "queries")}
        features[f"{task.key}-qrels"] = {"query-id": STRING, "corpus-id": STRING, "score": Value("int64")}
        if task.has_candidates:
            rows[f"{task.key}-top_ranked"] = [{"query-id": f"q{n}", "corpus-ids": ids} for n in range(N_VIDEOS)]
            features[f"{task.key}-top_ranked"] = {"query-id": STRING, "corpus-ids": List(STRING)}
        shared = {"dataset": task.key, "instruction": task.instruction, "abilities": list(abilities(task))}
        candidates = ids if task.has_candidates else []
        rows["default"] += [
            {**query, **shared, "relevant_ids": [ids[n]], "candidate_ids": candidates}
            for n, query in enumerate(queries)
        ]
    configs = {name: {"test": part} for name, part in rows.items()}
    _write_dataset(folder, configs, features, "default")


def write_pairs(folder, videos):
    """Training pairs of one format, and all of them (the same) as the default config."""
    empty = dict.fromkeys(PAIR)
    shared = {"instruction": "Find it.", "task": "t2v", "negatives": []}
    pairs = [
        {**empty, **shared, "query_text": f"video {n}", "target_video": video, "source_id": f"s{n}"}
        for n, video in enumerate(videos)
    ]
    splits = {"train": pairs[:4], "validation": pairs[4:]}
    _write_dataset(folder, {"all": splits, "t2v": splits}, {"all": PAIR, "t2v": PAIR}, "all")
    (folder / "mini.json").write_text('{"seed": 7}')


def _write_dataset(folder, configs, features, default):
    """Parquet files and the README that names them, as the builders leave them."""
    listed = []
    for name, splits in configs.items():
        (folder / name).mkdir(parents=True)
        for split, rows in splits.items():
            Dataset.from_list(rows, features=Features(features[name])).to_parquet(folder / name / f"{split}.parquet")
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        listed.append({"config_name": name, "data_files": files} | ({"default": True} if name == default else {}))
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'seed': 7, 'configs': listed})}---\n")


def write_results(folder, score=0.5):
    """Output folder of `run_uvrb.py` for the tiny benchmark, with a baseline."""
    folder.mkdir(parents=True)
    scores = {key: {"msrvtt": score, "ms_ti": score / 2}[key] for key in KEYS}

    def entry(key, value):
        sizes = {"n_queries": N_VIDEOS, "n_corpus": N_VIDEOS, "n_ranked": float(N_VIDEOS)}
        skipped = {"corpus": [], "queries": []}
        metric = TASKS[key].metric
        return {
            "metric": metric,
            "score": value,
            "chance": 1 / 6,
            **sizes,
            "scores": {metric: value},
            "skipped": skipped,
        }

    def model(name, role, values):
        entries = {key: entry(key, value) for key, value in values.items()}
        shared = {"path": f"build/hub/org/{name}", "role": role, "fingerprint": "0"}
        return {"name": name, **shared, "abilities": ability_scores(values), "datasets": entries}

    chance = dict.fromkeys(KEYS, 1 / 6)
    results = {
        "schema": "gve/uvrb-results",
        "schema_version": 1,
        "benchmark": "build/hub/org/uvrb-mini",
        "models": [model("gve-mini", "model", scores), model("gve-mini-base", "baseline", chance)],
        "chance": {"datasets": chance, "abilities": ability_scores(chance)},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "radar.png").write_bytes(b"\x89PNG")


def write_repos(root, model, processor):
    """The model and both dataset repos under `root/org`, as training and the builders leave them; returns `root`."""
    files = [write_video(root / f"v{number}.mp4", draw_frames(seed=number)) for number in range(N_VIDEOS)]
    videos = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    write_model(root / "org" / "gve-mini", model, processor)
    write_benchmark(root / "org" / "uvrb-mini", videos)
    write_pairs(root / "org" / "uvrd-mini", videos)
    return root
