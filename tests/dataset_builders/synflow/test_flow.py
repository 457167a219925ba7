"""The whole flow on rendered videos: planted faults, formats, the published dataset, resuming after a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import dill
import pytest
import yaml
from datatrove.data import Document
from stand_in_captioner import Captioner

from dataset_builders.referenced_media import MediaIndex
from dataset_builders.synflow import engine, pairing, plan, trial
from dataset_builders.synflow.__main__ import main
from dataset_builders.synflow.benchmark import main as benchmark
from dataset_builders.synflow.card import configs
from dataset_builders.synflow.documents import count_dropped
from dataset_builders.synflow.engine import _run_part, make_executor, open_pool, run, stages, work_folder
from dataset_builders.synflow.plan import forecast
from dataset_builders.synflow.publish import Publisher, read_rows
from dataset_builders.synflow.recipe import FORMATS, PAPER_BUDGETS, Recipe, RecipeError
from dataset_builders.synflow.rendered import FAULTS, draw_video
from dataset_builders.synflow.texts import rectify
from training.pairs import FrameStore, read_pairs
from training.streaming import StreamedPairs


ROOT = Path(__file__).parents[3]
# Among ten videos a theme often tells one from all others, so that its name alone would be a query.
FEW = {"part_size": 4, "quality": {}, "composition": {"text_alone_rank": 0}, "reserve": 1.0}
SMALL = {"t2t": 3, "t2i": 4, "t2v": 8, "ti2v": 2, "tv2v": 1, "i2v": 4, "v2v": 1}


def recipe_of(videos, faults=0.0, **changes):
    settings = {
        "name": "tiny",
        "seed": 5,
        "sources": [{"kind": "rendered", "id": "films", "videos": videos, "faults": faults}],
        "part_size": max(4, videos // 4),
        "captioner": {"kind": "graph"},
        "quality": {"similarity": {"model": "graph", "threshold": 0.6}},
        "budgets": SMALL,
        "output": {"validation_share": 0.0, "rows_per_shard": 5},
    }
    return Recipe(**{**settings, **changes})


def places(folder, store=None):
    return {"root": str(folder / "runs"), "output": str(folder / "data"), "store": str(store or folder / "answers")}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dropped_names(work):
    """`{video id: reason}`."""
    found = {}
    for path in work.glob("dropped/*/*/*.jsonl"):
        for line in path.read_text().splitlines():
            name = json.loads(line)["id"]
            if "#" not in name:
                found[name] = path.parts[-2]
    return found


def check_planted(recipe, work, least_kept):
    """Each planted fault is dropped for its reason, and `least_kept` of the good videos stay."""
    source = recipe.sources[0]
    dropped, lost, good, planted = dropped_names(work), [], 0, Counter()
    for number in range(source.videos):
        fault, name = draw_video(source, recipe.seed, number).fault, f"films/{number:07d}"
        if fault is None:
            good += 1
            lost += [(name, dropped[name])] if name in dropped else []
        else:
            planted[fault] += 1
            assert dropped.get(name) == FAULTS[fault], (name, fault)
    assert set(planted) == set(FAULTS)
    assert len(lost) <= (1 - least_kept) * good, lost
    return planted


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """25 videos, a fifth of them bad, so that each way of being bad occurs."""
    folder = tmp_path_factory.mktemp("flow")
    budgets = {"t2t": 2, "t2i": 4, "t2v": 14, "ti2v": 3, "tv2v": 2, "i2v": 4, "v2v": 2}
    recipe = recipe_of(25, faults=0.2, budgets=budgets, reserve=1.0)
    return recipe, folder, run(recipe, **places(folder))


def test_planted_faults_are_dropped_for_their_reasons_and_the_good_are_kept(flow):
    recipe, folder, _ = flow
    assert sum(check_planted(recipe, work_folder(folder / "runs", recipe), 0.97).values()) == 5


def test_the_dataset_loads_by_format_with_provenance(flow):
    recipe, _, output = flow
    assert set(datasets.get_dataset_config_names(str(output))) == {"all", *FORMATS}
    counts = Counter()
    for task in FORMATS:
        rows = datasets.load_dataset(str(output), task, split="train", streaming=True).decode(False)
        for row in rows:
            counts[task] += 1
            sides = (
                {n for n in ("text", "image", "video") if row[f"query_{n}"]},
                {n for n in ("text", "image", "video") if row[f"target_{n}"]},
            )
            names = {"t": "text", "i": "image", "v": "video"}
            assert sides == tuple({names[c] for c in part} for part in task.split("2"))
            assert len(row["negatives"]) == (task in ("t2v", "ti2v", "tv2v"))
            assert all(negative["video"]["bytes"] for negative in row["negatives"])
            assert row["source_id"].startswith("films/") and row["instruction"] and len(row["span"]) == 2
            assert (row["prompt_hash"] is None) == (row["query_text"] is None)
    total = sum(counts.values())
    for task, number in recipe.budgets.items():  # all shrink alike where one format has too few
        assert 0 < counts[task] <= number
        assert abs(counts[task] / total - number / sum(recipe.budgets.values())) < 0.06


def test_negatives_and_targets_differ(flow):
    for row in datasets.load_dataset(str(flow[2]), "all", split="train", streaming=True).decode(False):
        for negative in row["negatives"]:
            assert negative["video"]["bytes"] != row["target_video"]["bytes"]


def test_composed_targets_are_other_videos(flow):
    composed = [row for row in read_rows(flow[2]) if row["task"] in ("ti2v", "tv2v")]
    assert composed and all(row["target_id"] != row["source_id"] for row in composed)


def test_the_card_counts_what_was_dropped(flow):
    recipe, folder, output = flow
    card = (output / "README.md").read_text()
    assert all(f"| {reason} |" in card for reason in FAULTS.values())
    assert (output / "assets" / "distributions.png").stat().st_size > 1000
    assert len(list((output / "assets").glob("*.jpg"))) == 5


def test_a_finished_dataset_is_not_made_again(flow):
    recipe, folder, output = flow
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    run(recipe, **places(folder))
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_a_finished_dataset_that_was_deleted_is_written_again(flow, tmp_path):
    recipe, folder, output = flow
    kept = shutil.copytree(output, tmp_path / "kept")
    shutil.rmtree(output)
    run(recipe, **places(folder))
    assert contents(output) == contents(kept)


def test_a_run_goes_on_where_it_stopped_whatever_the_stage(flow, tmp_path, monkeypatch):
    """Each stage is stopped before a part and after one; the data are those of a run that nothing stopped."""
    recipe, _, output = flow
    names, count = [stage.name for stage in stages(recipe, tmp_path, tmp_path, tmp_path)], Counter()

    def stopping(pristine, rank):
        name = dill.loads(pristine).stage
        count[name] += 1
        if count[name] == 1:
            raise KeyboardInterrupt
        _run_part(pristine, rank)
        if count[name] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_run_part", stopping)
    for _ in range(2 * len(names)):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, **places(tmp_path))
    run(recipe, **places(tmp_path))
    parts = {name: 1 if name in ("select", "relate", "pair", "card") else 5 for name in names}
    assert count == {name: number + 1 for name, number in parts.items()}  # none was done twice
    assert contents(tmp_path / "data") == contents(output)


def test_tasks_share_the_captioners_concurrency_and_no_more_run_than_there_are_parts(tmp_path, monkeypatch):
    started = {}

    class Started:
        def __init__(self, kind, stage, recipe, work, parts, workers, depends):
            started[stage.name] = workers, stage

        def run(self):
            pass

        def get_incomplete_ranks(self, skip_completed):
            return []

    monkeypatch.setattr(engine, "make_executor", Started)
    captioner = {"url": "http://127.0.0.1:1/v1", "concurrency": 2, "requests_per_minute": 30}
    run(recipe_of(12, captioner=captioner, quality={}), **places(tmp_path), tasks=9)  # of three parts
    runner = started["caption"][1].pipeline[-1]
    assert {name: workers for name, (workers, _) in started.items()}["inspect"] == 3
    assert started["caption"][0] == started["compose"][0] == runner.workers == 2
    assert runner.config.max_concurrent_generations == 1


def test_a_folder_with_other_data_is_refused(flow, tmp_path):
    with pytest.raises(RecipeError, match="holds a dataset of another recipe"):
        run(recipe_of(4), root=str(tmp_path), output=str(flow[2]))


@pytest.mark.parametrize("level, good", [("raw", 25), ("filtered", 20)])
def test_the_same_archive_gives_raw_and_filtered_pairs(flow, tmp_path, level, good):
    """Captions as found, and what quality control leaves of them; no captioner is needed."""
    recipe, folder, _ = flow
    changes = {"pairs": level, "captioner": None, "budgets": {"t2v": good}, "shrink": False}
    output = run(Recipe(**{**recipe.model_dump(), **changes}), **places(tmp_path))
    rows = list(datasets.load_dataset(str(output), "t2v", split="train", streaming=True).decode(False))
    videos = [draw_video(recipe.sources[0], recipe.seed, int(row["source_id"][-7:])) for row in rows]
    assert len(rows) == good and all(row["negatives"] == [] and row["target_video"]["bytes"] for row in rows)
    assert (level == "raw") == any(video.fault for video in videos)
    said = {video.text if level == "raw" else rectify(video.text) for video in videos}
    assert {row["query_text"] for row in rows} == said
    with pytest.raises(RecipeError, match=f"pairs: {level} leaves out"):
        forecast(Recipe(**{**recipe.model_dump(), **changes}))
    card = (output / "README.md").read_text()
    assert "as they were found" in card and ("| video_static |" in card) == (level == "filtered")


def test_turns_of_captions_stills_and_relations_give_more_pairs_of_a_video(flow, tmp_path):
    """Two turns of five captions, three stills and two clips a video; no pair comes twice."""
    recipe, _, _ = flow
    most = {"t2v": 10, "t2i": 3, "i2v": 3, "ti2v": 3, "tv2v": 2, "v2v": 2}
    cutting = {"frames_per_video": 3, "clips_per_video": 2}
    changes = {"caption_rounds": 2, "pairs_per_video": most, "quality": {"cutting": cutting}, "reserve": 0.0}
    budgets = {"t2v": 60, "t2i": 18, "i2v": 18, "ti2v": 18, "tv2v": 12, "v2v": 12}
    settings = {**recipe.model_dump(), **changes, "budgets": budgets}
    source = {**recipe.sources[0].model_dump(), "videos": 6, "faults": 0.0}
    output = run(Recipe(**{**settings, "sources": [source], "composition": FEW["composition"]}), **places(tmp_path))
    rows = list(read_rows(output))
    served = Counter((row["task"], row["source_id"]) for row in rows)
    for task in budgets:
        assert 1 < max(number for (name, _), number in served.items() if name == task) <= most[task]
    assert len({row["pair_id"] for row in rows}) == len(rows)
    texts = Counter((row["source_id"], row["query_text"]) for row in rows if row["task"] == "t2v")
    assert len(texts) > 0.8 * texts.total()  # another turn says it in other words
    spans = Counter((row["task"], row["source_id"], *row["span"]) for row in rows if row["task"] in ("i2v", "v2v"))
    assert set(spans.values()) == {1}


def test_slurm_scripts_run_the_parts_in_order(flow, tmp_path, monkeypatch):
    """sbatch is a program here that keeps what it is given and answers with a job's number."""
    recipe, sbatch, jobs = recipe_of(8), tmp_path / "sbatch", tmp_path / "jobs"
    jobs.mkdir()
    sbatch.write_text(
        f'#!/bin/bash\nn=$(ls {jobs} | wc -l)\necho "$@" > {jobs}/$n.args\ncat "${{@: -1}}" > {jobs}/$n.script\n'
        'echo "Submitted batch job $n"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = None
    for stage in stages(recipe, tmp_path / "work", tmp_path / "data", tmp_path / "answers", 2)[:2]:
        executor = make_executor("slurm", stage, recipe, tmp_path / "work", 4, 2, before)
        executor.run()
        before = executor
    scripts = [path.read_text() for path in sorted(jobs.glob("*.script"), key=lambda p: int(p.stem))]
    assert "#SBATCH --array=0-3%2" in scripts[0] and "--job-name=synflow-inspect" in scripts[0]
    assert "launch_pickled_pipeline" in scripts[0] and "logs/inspect/executor.pik" in scripts[0]
    select = next(k for k, text in enumerate(scripts) if "job-name=synflow-select" in text)
    args = sorted(jobs.glob("*.args"), key=lambda p: int(p.stem))[select].read_text()
    assert "--dependency=afterok:0" in args


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """10 videos captioned over HTTP by a server that fails at every fifth request, and what was sent."""
    folder = tmp_path_factory.mktemp("served")
    films = [draw_video(recipe_of(10).sources[0], 5, number).film for number in range(10)]
    server = Captioner(films, faults=0.2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = endpoint_recipe(server.url)
    output = run(recipe, **places(folder))
    server.shutdown()
    return recipe, folder, output, server


def endpoint_recipe(url, **changes):
    settings = {"url": url, "model": "stand-in", "side": 112, "frames": 4, "concurrency": 4, **changes}
    return recipe_of(10, captioner=settings, **FEW)


def test_at_a_fifth_of_faults_no_video_is_lost(served):
    recipe, folder, output, server = served
    assert sum(server.counts[fault] for fault in server.counts if fault != "good") >= 3
    work = work_folder(folder / "runs", recipe)
    assert not [reason for stage, reason in count_dropped(work) if stage in ("caption", "compose")]
    assert set(server.paid.values()) == {1}


def test_a_run_says_how_far_it_is_and_what_it_paid(served, tmp_path, capsys):
    recipe, folder, _, server = served
    dear = {**recipe.captioner.model_dump(), "dollars_per_million_output_tokens": 1e6}
    settings = {**recipe.model_dump(mode="json"), "captioner": dear}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    words = [str(tmp_path / "recipe.yaml"), "--status", "--root"]
    assert main([*words, str(folder / "runs")]) == 0
    said = capsys.readouterr().out
    assert "done           3  compose" in said and "done           1  card" in said
    tokens = int(re.search(r"\+ ([\d,]+) tokens", said)[1].replace(",", ""))
    assert f"{tokens:,}.00 dollars" in said and tokens > 100
    assert main([*words, str(tmp_path)]) == 1 and "no run of this recipe; start it" in capsys.readouterr().err


def test_answers_are_about_what_was_sent(served, tmp_path):
    """The server saw the right pictures: its texts are those that the graphs give in-process."""
    recipe, _, output, _ = served
    graph = recipe_of(10, **FEW)
    expected = run(graph, **places(tmp_path))
    texts = {row["pair_id"]: (row["query_text"], row["target_text"]) for row in read_rows(expected)}
    assert texts == {row["pair_id"]: (row["query_text"], row["target_text"]) for row in read_rows(output)}


def test_videos_and_schemas_are_sent_where_the_recipe_says_so(served, tmp_path, capsys):
    """`send: video` and `structured: true`: whole videos with the task's JSON schema, and the same texts come back."""
    films = [draw_video(recipe_of(10).sources[0], 5, number).film for number in range(10)]
    server = Captioner(films)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = endpoint_recipe(server.url, send="video", structured=True)
    output = run(recipe, **places(tmp_path))
    server.shutdown()
    assert re.search(r"caption: .* requests, [\d,]+ \+ [\d,]+ tokens", capsys.readouterr().err)  # while it runs
    texts = {row["pair_id"]: (row["query_text"], row["target_text"]) for row in read_rows(served[2])}
    assert texts == {row["pair_id"]: (row["query_text"], row["target_text"]) for row in read_rows(output)}
    kinds = {
        "video_captions": {"video_url"},
        "frame_captions": {"image_url"},
        "frame_query": {"image_url", "video_url"},
        "clip_query": {"video_url"},
    }
    assert {name for _, name, _ in server.sent} == set(kinds)
    assert all(strict and media == kinds[name] for media, name, strict in server.sent)


def start(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def start_captioner(log, port=0):
    program = Path(__file__).with_name("stand_in_captioner.py")
    words = [program, "--videos", 10, "--seed", 5, "--port", port, "--log", log]
    process = start(words)
    return process, int(process.stdout.readline())


def flow_command(tmp_path, tasks):
    words = ["-m", "dataset_builders.synflow", tmp_path / "recipe.yaml", "--tasks", tasks]
    return words + [word for name, place in places(tmp_path).items() for word in (f"--{name}", place)]


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def killed_run(tmp_path, served, whom, after, tasks):
    """A run whose driver, worker or captioner is killed once `after` answers were paid; what was paid in all."""
    log = tmp_path / "paid.log"
    log.touch()
    captioner, port = start_captioner(log)
    settings = endpoint_recipe(f"http://127.0.0.1:{port}/v1").model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    driver = start(flow_command(tmp_path, tasks))
    try:
        wait_for(lambda: len(log.read_text().splitlines()) >= after, driver)
        if whom == "driver":
            driver.kill()
            driver.wait()
            driver = start(flow_command(tmp_path, 1))
        elif whom == "captioner":
            captioner.kill()
            captioner.wait()
            captioner, _ = start_captioner(log, port)
        else:
            os.kill(worker_of(driver.pid), signal.SIGKILL)
        driver.communicate(timeout=600)
        assert driver.returncode == 0
    finally:
        driver.kill()
        captioner.kill()
    assert contents(tmp_path / "data") == contents(served[2])
    paid = Counter(log.read_text().split())
    in_flight = 4  # the recipe's concurrency
    assert sum(paid.values()) - len(paid) <= in_flight
    return paid


def worker_of(pid):
    """A process that runs a part."""
    import psutil

    family = psutil.Process(pid).children(recursive=True)
    busy = [process for process in family if any("/locks/" in file.path for file in process.open_files())]
    return (busy or family)[-1].pid


def test_a_killed_driver_pays_nothing_twice_and_the_data_are_the_same(served, tmp_path):
    killed_run(tmp_path, served, "driver", after=6, tasks=2)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["driver", "worker", "captioner"])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_kills_at_other_moments(served, tmp_path, whom, after):
    killed_run(tmp_path, served, whom, after, tasks=2)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 4])
def test_any_number_of_tasks_gives_the_same_bytes(flow, tmp_path, tasks):
    recipe, _, output = flow
    run(recipe, **places(tmp_path), tasks=tasks)
    assert contents(tmp_path / "data") == contents(output)


@pytest.mark.slow
def test_ray_runs_the_same(flow, tmp_path):
    ray = pytest.importorskip("ray")
    recipe, _, output = flow
    ray.init(num_cpus=2)
    try:
        run(recipe, **places(tmp_path), executor="ray", tasks=2)
    finally:
        ray.shutdown()
    assert contents(tmp_path / "data") == contents(output)


@pytest.mark.slow
def test_two_thousand_videos_with_a_tenth_bad(tmp_path):
    recipe = recipe_of(2000, faults=0.1, part_size=100, budgets=PAPER_BUDGETS, output={"validation_share": 0.02})
    output = run(recipe, **places(tmp_path), tasks=2)
    assert sum(check_planted(recipe, work_folder(tmp_path / "runs", recipe), 0.97).values()) == 200
    counts = Counter(row["task"] for row in read_rows(output))
    total, paper = sum(counts.values()), sum(PAPER_BUDGETS.values())
    for task in FORMATS:
        assert abs(counts[task] / total - PAPER_BUDGETS[task] / paper) < 0.01
    groups = {
        split: {r["source_id"] for r in read_rows(output) if r["split"] == split} for split in ("train", "validation")
    }
    assert groups["validation"] and not groups["train"] & groups["validation"]


def test_the_plan_counts_without_running(tmp_path, capsys):
    recipe = recipe_of(12)
    planned = forecast(recipe, sample=4)
    assert planned.videos == 12 and planned.kept == 12 and planned.requests["video_captions"] == 12
    assert planned.pairs == SMALL and planned.input_tokens > 12 * 8 * 256
    assert planned.output_gigabytes > 0 and all(seconds > 0 for seconds in planned.seconds.values())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert main([str(tmp_path / "recipe.yaml"), "--plan", "--sample", "2", "--root", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "videos    12" in said and "not in it" not in said
    benchmark = {"benchmark": "org/is-not-downloaded"}
    assert "not in it reading org/is-not-downloaded" in str(
        forecast(recipe_of(12, decontamination=benchmark), sample=1)
    )
    assert not (tmp_path / "runs").exists()


def test_a_plan_of_two_tasks_times_two_processes_at_once(monkeypatch):
    """Each takes its part of the sample, and the busiest task's parts are what a stage takes."""
    monkeypatch.setattr(plan, "cores", lambda: 2)
    pools = []
    monkeypatch.setattr(trial, "open_pool", lambda *facts: pools.append(facts[0]) or open_pool(*facts))
    planned = forecast(recipe_of(12), tasks=5, sample=2)
    assert planned.kept == 12 and pools == [2] * 5  # inspect, cut twice, ask, publish; parts: 4
    assert forecast(recipe_of(12), tasks=2, sample=2, executor="slurm").kept == 12 and len(pools) == 5


def test_the_busiest_task_takes_the_next_part_when_it_is_free():
    assert plan._busiest(800, 128, 2) == 416  # parts of 128, the last of 32: 3 + 32 beside 3
    assert plan._busiest(800, 128, 1) == 800 and plan._busiest(10, 128, 4) == 10
    assert plan._busiest(1024, 128, 4) == 256


def test_stills_that_formats_share_are_counted_once():
    assert plan._mean_most([0.5, 0.5]) == pytest.approx(0.75)  # none asks for one video in four
    assert plan._mean_most([1.25, 0.5, 0.0]) == pytest.approx(1.25)
    assert plan._mean_most([0.0, 0.0]) == 0


def test_a_process_that_fails_in_a_plan_ends_it_with_its_own_error(tmp_path):
    """The others wait for it: they are released, and theirs is not the error that is shown."""
    (tmp_path / "there.mp4").write_bytes(b"a video")
    names = "there.mp4", "gone.mp4"
    documents = [Document(text=" ", id=name, metadata={"file": str(tmp_path / name)}) for name in names]
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        trial._together(trial.publish, recipe_of(2), tmp_path, documents, 2)
    timing, kept = trial._together(trial.publish, recipe_of(2), tmp_path, documents[:1] * 4, 2)
    assert timing.each > 0 and len(kept) == 4


def test_the_benchmark_says_how_fast_and_how_far_off(tmp_path, capsys):
    assert benchmark(["--videos", "12"]) == 0
    said = capsys.readouterr().out
    assert "videos a second without captioner, 1 tasks" in said and "%  inspect: video" in said
    assert "caption" not in said.partition("\n")[2]
    settings = recipe_of(8, **FEW).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert benchmark(["--recipe", str(tmp_path / "recipe.yaml"), "--sample", "4"]) == 0
    said = capsys.readouterr().out
    assert all(f"{stage} " in said for stage in ("inspect", "cut", "pair", "publish", "all"))
    assert "the forecast is off by" in said


def composing(text, rank):
    """Pairs of a reference and a target among three videos, of which the target's captions alone say zebra."""
    said = {"herd of horses": "a herd of horses", "zebra": "a herd with a zebra", "horses": "horses in a herd"}
    documents = [
        Document(
            text=" ",
            id=f"films/{k}",
            metadata={
                "group": str(k), "split": "train", "part": "00000", "file": f"{k}.mp4", "serves": {"ti2v": 1},
                "answers": [{"task": "video_captions", "answer": dict.fromkeys("12345", caption)}],
                "frames": [{"time": 0.5, "file": "0.jpg"}], "relations": [], "queries": [],
            },
        )
        for k, caption in enumerate(said.values())
    ]  # fmt: skip
    relation = {"task": "ti2v", "part": 0, "similarity": 0.5, "target": {"id": "films/1"}}
    answer = {"task": "frame_query", "still": 0, "prompt": "hash", "answer": {"query": text}}
    documents[0].metadata.update(relations=[relation], queries=[answer])
    step = pairing.Pairing(recipe_of(3, composition={"text_alone_rank": rank}), Path(), None)
    step._neighbours, dropped = pairing.Neighbours(documents, 10), []
    step._by_id = {document.id: document for document in documents}
    step._drop = lambda document, task, reason, detail: dropped.append((task, reason, detail))
    return list(step._ti2v(documents[0])), dropped


def test_a_composed_query_needs_its_picture():
    """Dropped where its text alone ranks the target first; kept where it tells nothing, or as much of others."""
    assert composing("now with a zebra", 1) == ([], [("ti2v", "text_alone_suffices", "now with a zebra")])
    for text, rank in (("now seen from above", 1), ("the same horses", 1), ("now with a zebra", 0)):
        (pair,), dropped = composing(text, rank)
        assert pair["query"] == {"text": text, "image": "0.jpg"} and pair["target"] == {"video": "1.mp4"}
        assert pair["target_id"] == "films/1" and pair["negatives"] == [{"video": "0.mp4"}] and not dropped
    assert composing("the same horses", 3)[0]  # of whose words the target has none


def test_budgets_shrink_together_or_say_what_is_missing():
    recipe = recipe_of(4, budgets={"t2v": 800, "t2t": 100})
    assert pairing.scaled_budgets(recipe, {"t2v": 80, "t2t": 50}) == {"t2v": 80, "t2t": 10}
    assert pairing.scaled_budgets(recipe, {"t2v": 900, "t2t": 100}) == {"t2v": 800, "t2t": 100}
    assert pairing.scaled_budgets(recipe, {"t2v": 3, "t2t": 9}) == {"t2v": 3, "t2t": 1}
    with pytest.raises(pairing.BudgetError, match="no pairs at all"):
        pairing.scaled_budgets(recipe, {"t2v": 80})
    strict = recipe_of(4, budgets={"t2v": 800}, shrink=False)
    with pytest.raises(pairing.BudgetError, match="t2v: 80 of 800"):
        pairing.scaled_budgets(strict, {"t2v": 80})


def test_referenced_media_are_stored_once_and_put_back(flow, tmp_path, processor):
    """Same pairs as embedded, from the same run's files; training reads both alike."""
    recipe, folder, output = flow
    referenced = Recipe(**{**recipe.model_dump(), "output": {**recipe.output.model_dump(), "media": "referenced"}})
    work = work_folder(folder / "runs", recipe)
    list(Publisher(referenced, work, tmp_path).run())
    front = yaml.safe_dump({"configs": configs(tmp_path)}, sort_keys=False)
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    media = MediaIndex(str(tmp_path))
    embedded = datasets.load_dataset(str(output), "ti2v", split="train", streaming=True).decode(False)
    for row, whole in zip(datasets.load_dataset(str(tmp_path), "ti2v", split="train"), embedded):
        filled = media.fill(row)
        assert filled["query_image"]["bytes"] == whole["query_image"]["bytes"]
        assert filled["negatives"][0]["video"]["bytes"] == whole["negatives"][0]["video"]["bytes"]
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.parquet")) < sum(
        p.stat().st_size for p in output.rglob("*.parquet")
    )
    with pytest.raises(ValueError, match="no such medium"):
        media["absent"]
    store = FrameStore(tmp_path / "frames", processor)
    pairs, skipped = read_pairs(str(tmp_path), "ti2v", "train", store)
    assert (pairs, skipped) == read_pairs(str(output), "ti2v", "train", store) and not skipped
    settings = {"hard_negatives": 1, "seed": 0, "root": tmp_path / "windows", "window_pairs": 8, "distinct": False}
    stream = StreamedPairs(str(tmp_path), "ti2v", "train", 2, processor=processor, **settings)
    assert set(stream.draw(0).pairs) <= set(pairs)
