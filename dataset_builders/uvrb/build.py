"""From sources to the four repos of UVRB: what is faulty is named and left out, nothing else is.

`build` can be killed at any moment and goes on: files of the source are prepared one by one (`prepare.py`), tables are
written shard by shard into a hidden folder, which becomes the repo at the end.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset_builders.hub_layout import default_row, write_card, write_table, write_whole
from dataset_builders.uvrb import duplicates, nano, video_files
from dataset_builders.uvrb.builders import UVRB
from dataset_builders.uvrb.prepare import prepare_all
from dataset_builders.uvrb.sources import Item, Problem
from dataset_builders.uvrb.tasks import Task


FLAVOURS = ("uvrb", "uvrb-videos", "uvrb-nano", "uvrb-index")
RECORD = "uvrb.json"  # how the repo was built, beside its tables
REPORT = "report.json"
SHARD_BYTES = 400 << 20  # of media; the Hub asks for files below some GB, streaming for small ones


@dataclass
class Dataset:
    """One dataset with sound files only.

    Args:
        task (`Task`): what it is.
        corpus, queries (list of `Item`): in the source's order.
        relevant (`dict[str, list[str]]`): at least one corpus id a query.
        candidates (`dict[str, list[str]]`, *optional*): corpus ids that each query ranks.
    """

    task: Task
    corpus: list[Item]
    queries: list[Item]
    relevant: dict[str, list[str]]
    candidates: dict[str, list[str]] | None


def check(tasks, cache, clips=True, processes=1):
    """Reads sources and prepares their files.

    Args:
        tasks (list of `SourceTask`): one a dataset.
        cache (`Path`): see `prepare_all`.
        clips (`bool`): whether 8-frame videos are wanted.
        processes (`int`): at the same time.

    Returns:
        `(list[Dataset], dict[Media, Prepared], dict)`: the last is the report.

    Raises:
        SourceError: a source cannot be read at all.
    """
    records = [task.read() for task in tasks]
    media = [part for each in records for item in (*each.corpus, *each.queries) for part in item.media]
    prepared = prepare_all(media, Path(cache), clips, processes)
    found = [finish(each, prepared) for each in records]
    problems = sorted((p for _, rows in found for p in rows), key=lambda p: (p.dataset, p.side, p.id, p.reason))
    datasets = [dataset for dataset, _ in found]
    report = {
        "datasets": {dataset.task.key: counts(dataset, problems) for dataset in datasets},
        "problems": [asdict(problem) for problem in problems],
        "videos_touched": touched(prepared),
        "duplicates": [row for dataset in datasets for row in find_duplicates(dataset, prepared)],
    }
    return datasets, prepared, report


def finish(records, prepared):
    """Leaves out broken files and what hangs on them.

    Args:
        records (`Records`): as read.
        prepared (`dict[Media, Prepared]`): of its files.

    Returns:
        `(Dataset, list[Problem])`
    """
    key, problems = records.task.key, list(records.problems)

    def report(side, id, reason):
        problems.append(Problem(key, side, str(id), reason))

    sides = {}
    for side, items in (("corpus", records.corpus), ("queries", records.queries)):
        sides[side] = []
        for item in items:
            broken = [prepared[part] for part in item.media if prepared[part].is_broken]
            if broken:
                report(side, item.id, f"{broken[0].name} is broken: {'; '.join(broken[0].reasons)}")
                continue
            sides[side].append(item)
            if any(part.sha256 and part.sha256 != prepared[part].sha256 for part in item.media):
                report(side, item.id, "its file is not the one that was indexed; it is used all the same")
    present = {item.id for item in sides["corpus"]}
    gone = {(problem.side, problem.id) for problem in problems}
    queries, relevant, candidates = [], {}, {}
    for item in sides["queries"]:
        positives = records.positives.get(item.id, [])
        if not positives:
            report("queries", item.id, "it has no positive; the query is left out")
            continue
        if records.candidates is not None:
            candidates[item.id] = [name for name in records.candidates.get(item.id, []) if name in present]
            for name in set(records.candidates.get(item.id, ())) - present:
                report("top_ranked", item.id, f"its candidate {name!r} is not in the corpus")
        kept = [name for name in positives if name in (candidates.get(item.id, present))]
        for name in positives:
            if name not in kept:
                report("qrels", item.id, f"its positive {name!r} is not in the corpus; the pair is left out")
        if kept:
            queries.append(item)
            relevant[item.id] = kept
        else:
            report("queries", item.id, "none of its positives is in the corpus; the query is left out")
    known = {item.id for item in records.queries} | {name for side, name in gone if side == "queries"}
    for name in records.positives:
        if name not in known:
            report("qrels", name, "the queries lack this id")
    kept_candidates = {name: candidates[name] for name in relevant} if records.candidates is not None else None
    return Dataset(records.task, sides["corpus"], queries, relevant, kept_candidates), problems


def counts(dataset, problems):
    """Numbers of a dataset beside the paper's table, and the ids that were left out."""
    task = dataset.task
    built = {"queries": len(dataset.queries), "corpus": len(dataset.corpus)}
    if task.has_candidates:
        lists = (dataset.candidates or {}).values()
        built["candidates"] = round(float(np.mean([len(names) for names in lists])), 2) if lists else 0.0
    published = {"queries": task.n_query, "candidates" if task.has_candidates else "corpus": task.n_corpus}
    missing = {side: [] for side in ("queries", "corpus")}
    ids = {"queries": {item.id for item in dataset.queries}, "corpus": {item.id for item in dataset.corpus}}
    for problem in problems:
        side = problem.side
        if problem.dataset == task.key and side in missing and problem.id not in ids[side]:
            missing[side] = sorted({*missing[side], problem.id})
    # About 10 candidates a query is all that the paper says.
    agree = all(abs(built[side] - n) <= (0.5 if side == "candidates" else 0) for side, n in published.items())
    return {"published": published, "built": built, "agrees": agree, "missing": missing}


def touched(prepared):
    """Every file that is not what the source had, and why; twice-used files once."""
    rows = {
        (done.name, done.action): {"file": done.name, "action": done.action, "reasons": done.reasons}
        for done in prepared.values()
        if done.action != "none"
    }
    return [rows[name] for name in sorted(rows)]


def find_duplicates(dataset, prepared):
    """Near-duplicates by perceptual hash: videos of the corpus, and queries that show a video of the corpus.

    A picture is a frame of its answer by construction, so only other videos count there.
    """
    ids = [item.id for item in dataset.corpus]
    if not ids:
        return []
    frames = video_files.NUM_FRAMES
    vectors = np.stack([duplicates.unpack(prepared[item.video].hashes, frames) for item in dataset.corpus])
    rows = [("corpus", *pair) for pair in duplicates.within(ids, vectors)]
    for kind, n_frames in (("image", 1), ("video", frames)):
        asked = [item for item in dataset.queries if getattr(item, kind)]
        hashes = [duplicates.unpack(prepared[getattr(item, kind)].hashes, n_frames) for item in asked]
        for query, video in duplicates.between([item.id for item in asked], hashes, ids, vectors):
            if kind == "video" or video not in dataset.relevant[query]:
                rows.append(("query", query, video))
    return [{"dataset": dataset.task.key, "side": side, "first": one, "second": two} for side, one, two in rows]


def build(tasks, flavours, root, cache, processes=1, model=None, seed=0, source="release"):
    """Writes the repos.

    Args:
        tasks (list of `SourceTask`): one a dataset.
        flavours (iterable of `str`): some of `FLAVOURS`.
        root (`Path`): folder of the namespace.
        cache (`Path`): prepared files, shared by all flavours; may be deleted when no build is to follow.
        processes (`int`): at the same time.
        model (`str`, *optional*): GVE repo that chooses the nano flavour's distractors; else looks decide.
        seed (`int`): of the nano flavour's queries.
        source (`str`): what the repo's record calls the source.

    Returns:
        `(list[Path], dict)`: the repos and the report.

    Raises:
        SourceError: a source cannot be read at all.
    """
    flavours = [flavour for flavour in FLAVOURS if flavour in set(flavours)]
    clips = bool({"uvrb", "uvrb-nano"} & set(flavours))
    datasets, prepared, report = check(tasks, cache, clips, processes)
    folders = []
    for flavour in flavours:
        settings = {"flavour": flavour, "source": source, "datasets": [dataset.task.key for dataset in datasets]}
        parts = datasets
        if flavour in ("uvrb", "uvrb-nano"):
            settings |= {
                "num_frames": video_files.NUM_FRAMES,
                "rate_factors": list(video_files.CLIP_QUALITIES),
                "clip_bytes": video_files.CLIP_BYTES,
            }
        if flavour == "uvrb-nano":
            scorer = nano.score_by_model(model) if model else nano.score_by_hash
            parts = [nano.choose(dataset, prepared, scorer, seed) for dataset in datasets]
            settings |= {"seed": seed, "distractors": Path(model).name if model else "perceptual hash"}
        folders.append(write_repo(Path(root) / flavour, parts, prepared, report, settings))
    return folders, report


def write_repo(folder, datasets, prepared, report, settings):
    """One flavour; kept as it is if it was built from the same rows before.

    Returns:
        `Path`: the repo.
    """
    tables, serves = lay_out(datasets, prepared, settings["flavour"])
    settings = {**settings, "rows": _digest(tables)}
    done = folder / RECORD
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == settings:
        write_whole(folder / REPORT, report_json(report))
        return folder
    temporary = folder.with_name(f".{folder.name}.tmp")
    plan = temporary / RECORD
    if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != settings:
        shutil.rmtree(temporary, ignore_errors=True)
        write_whole(plan, report_json(settings))
    scratch = temporary / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    paths = {
        name: _write_shards(name, rows, temporary / "data", scratch, settings["flavour"] == "uvrb-index")
        for name, rows in tqdm(tables.items(), desc=folder.name, unit="table")
    }
    shutil.rmtree(scratch, ignore_errors=True)
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": paths[table]}]}
        for name, table in serves.items()
    ]
    configs[0]["default"] = True
    write_card(temporary, configs, license="other")
    write_whole(temporary / REPORT, report_json(report))
    for half in temporary.rglob(".*.tmp"):  # of a run that was killed
        half.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def lay_out(datasets, prepared, flavour):
    """Rows of every table, and for each config the table that serves it: equal corpora share one.

    Returns:
        `(dict[str, list[dict]], dict[str, str])`: media of a row as `{"path", "sha256"}`.
    """
    row_of = partial(_row, prepared=prepared, flavour=flavour)
    tables, serves, corpora = {"default": []}, {"default": "default"}, {}
    for dataset in datasets:
        key, task = dataset.task.key, dataset.task
        queries = [row_of(item) for item in dataset.queries]
        candidates = dataset.candidates or {}
        tables["default"] += [
            default_row(task, row, dataset.relevant[row["id"]], candidates.get(row["id"])) for row in queries
        ]
        corpus = [row_of(item) for item in dataset.corpus]
        name = corpora.setdefault(_digest({"": corpus}), f"{key}-corpus")
        tables.setdefault(name, corpus)
        tables[f"{key}-queries"] = queries
        tables[f"{key}-qrels"] = [
            {"query-id": row["id"], "corpus-id": video, "score": 1}
            for row in queries
            for video in dataset.relevant[row["id"]]
        ]
        if task.has_candidates:
            tables[f"{key}-top_ranked"] = [
                {"query-id": row["id"], "corpus-ids": candidates.get(row["id"], [])} for row in queries
            ]
        serves |= {config: name if config.endswith("-corpus") else config for config in task.configs}
    return tables, serves


def _row(item, prepared, flavour):
    if flavour == "uvrb-index":
        files = {f"{kind}_file": getattr(item, kind) and getattr(item, kind).name for kind in ("image", "video")}
        done = [prepared[part] for part in item.media]
        return {
            "id": item.id,
            "text": item.text,
            **files,
            "sha256": done[0].sha256 if done else None,
            "duration_s": done[0].facts.get("duration_s") if done else None,
        }
    row = {"id": item.id, "text": item.text, "image": None, "video": None}
    if item.image:
        done = prepared[item.image]
        row["image"] = {"path": done.file, "sha256": done.file_sha256}
    if item.video:
        done = prepared[item.video]
        whole = flavour == "uvrb-videos"
        path, sha256 = (done.file, done.file_sha256) if whole else (done.clip, done.clip_sha256)
        row["video"] = {"path": path, "sha256": sha256}
    return row


def _write_shards(name, rows, folder, scratch, index):
    """Paths in the repo of a table's shards; those that are there already stay."""
    paths = []
    lines = scratch / f"{name}.jsonl"
    write_whole(lines, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
    for shard, (start, stop) in enumerate(_shards(rows)):
        there = sorted((folder / name).glob(f"test-{shard:05d}-*.parquet"))
        if there:
            paths.append(f"data/{name}/{there[0].name}")
            continue
        settings = {"rows": str(lines), "start": start, "stop": stop, "index": index}
        paths.append(write_table(UVRB, name, folder, str(scratch), shard=shard, **settings)["test"])
    return paths


def _shards(rows):
    """`(start, stop)` of consecutive rows whose media fit into a shard; an empty table is one empty shard."""
    edges, size = [0], 0
    for i, row in enumerate(rows):
        own = sum(Path(value["path"]).stat().st_size for value in row.values() if isinstance(value, dict))
        if size and size + own > SHARD_BYTES:
            edges.append(i)
            size = 0
        size += own
    edges.append(len(rows))
    return list(zip(edges, edges[1:]))


def _digest(tables):
    """Hash of all rows with the content of their media, wherever these lie."""
    digest = hashlib.sha256()
    for name, rows in tables.items():
        digest.update(name.encode())
        for row in rows:
            plain = {k: v["sha256"] if isinstance(v, dict) else v for k, v in row.items()}
            digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def report_json(content):
    return f"{json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)}\n".encode()


def summarise(report):
    """Lines on a report for the terminal."""
    for key, row in report["datasets"].items():
        parts = [f"{row['built'][side]} of {n} {side}" for side, n in row["published"].items()]
        lost = [f"{side} {name}" for side, names in row["missing"].items() for name in names]
        yield f"{key}: {', '.join(parts)}{'; left out: ' + ', '.join(lost) if lost else ''}"
    actions = Counter(row["action"] for row in report["videos_touched"])
    yield f"{len(report['problems'])} problems, {len(report['duplicates'])} near-duplicates; files touched: " + (
        ", ".join(f"{n} {action}" for action, n in sorted(actions.items())) or "none"
    )
