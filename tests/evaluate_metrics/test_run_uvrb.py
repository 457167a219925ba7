"""The runner on 16 tiny datasets: scores, shared corpora, resuming, skipped items, processes, messages."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
from tiny_benchmark import N_CORPUS, SHARED, media, write_benchmark, write_stub
from transformers import BertConfig, BertModel

from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.encoders import RandomEncoder
from evaluate_metrics.retrieval_data import UvrbError
from evaluate_metrics.run_uvrb import RunArguments, main, run
from evaluate_metrics.uvrb_abilities.averages import ABILITIES


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "evaluate_metrics" / "run_uvrb.py"


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def entry(results, key, place=0):
    return results["models"][place]["datasets"][key]


def test_whole_benchmark(benchmark, stub, stub_log, tmp_path):
    results = run(RunArguments(stub, benchmark, str(tmp_path / "out")))
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["schema"] == "gve/uvrb-results" and results["schema_version"] == 2
    assert list(results["models"][0]["datasets"]) == list(TASKS)
    assert all(entry(results, key)["score"] == 1.0 for key in TASKS)
    assert {results["models"][0]["abilities"][name] for name in (*ABILITIES, "avg_abilities", "avg_datasets")} == {1.0}
    chance = results["chance"]["datasets"]
    assert chance["msrvtt"] == pytest.approx(1 / 12) and chance["cmrb"] == pytest.approx(10 / 12)
    assert chance["ms_ti"] == pytest.approx(1 / 4) and entry(results, "ms_ti")["n_ranked"] == 4
    assert not list((tmp_path / "out").rglob("*.tmp"))
    # each instruction once, on the queries; a corpus that datasets share is embedded once
    lines = [line.split(" ", 2) for line in stub_log.read_text().splitlines()]
    assert all(int(count) == N_CORPUS for _, count, _ in lines)
    instructions = [instruction for _, _, instruction in lines]
    assert [text for text in instructions if text != "None"] == [task.instruction for task in TASKS.values()]
    assert instructions.count("None") == len(TASKS) - len(SHARED)


def test_baselines_and_chance(benchmark, stub, stub_log, tmp_path):
    wrong = write_stub(tmp_path / "wrong", shift=1)
    keys = ["msrvtt", "crb_t", "ms_ti"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "radar.png").write_bytes(b"of an earlier run on all datasets")
    results = run(RunArguments(stub, benchmark, str(tmp_path / "out"), keys, [wrong, "random"]))
    assert [(model["name"], model["role"]) for model in results["models"]] == [
        ("stub", "model"),
        ("wrong", "baseline"),
        ("random", "baseline"),
    ]
    assert [entry(results, "msrvtt", place)["score"] for place in (0, 1)] == [1.0, 0.0]
    assert entry(results, "msrvtt", 1)["scores"]["recall@10"] < 1
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| msrvtt" in text and "Partial coverage: 3 of 16 datasets" in text
    assert not (tmp_path / "out" / "radar.png").exists()  # two abilities make no radar


def test_models_of_one_name_are_told_apart(benchmark, stub, stub_log, tmp_path):
    other = write_stub(tmp_path / "other" / "stub", shift=1)
    results = run(RunArguments(stub, benchmark, str(tmp_path / "out"), ["ms_ti"], [other]))
    assert [model["name"] for model in results["models"]] == ["stub", other]


def test_a_second_run_embeds_nothing_and_writes_the_same(benchmark, stub, stub_log, tmp_path):
    args = RunArguments(stub, benchmark, str(tmp_path / "out"), ["msrvtt", "msrvtt_i2v"])
    run(args)
    first, calls = (tmp_path / "out" / "results.json").read_bytes(), stub_log.read_text()
    run(args)
    assert (tmp_path / "out" / "results.json").read_bytes() == first
    assert stub_log.read_text() == calls


@pytest.mark.parametrize("limit", [0, 200])
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    benchmark, stub, stub_log, tmp_path, monkeypatch, limit
):
    keys = ["crb_s", "crb_t", "ms_tv"]
    whole = run(RunArguments(stub, benchmark, str(tmp_path / "whole"), keys))
    calls = len(stub_log.read_text().splitlines())
    stub_log.unlink()
    monkeypatch.setenv("STUB_LIMIT", str(limit))
    with pytest.raises(RuntimeError, match="killed"):
        run(RunArguments(stub, benchmark, str(tmp_path / "out"), keys))
    monkeypatch.delenv("STUB_LIMIT")
    assert run(RunArguments(stub, benchmark, str(tmp_path / "out"), keys)) == whole
    assert len(stub_log.read_text().splitlines()) == calls + 1  # only the call that died is made again


def test_a_change_of_the_model_or_of_the_benchmark_is_noticed(stub, stub_log, tmp_path):
    out = str(tmp_path / "out")
    bench = write_benchmark(tmp_path / "bench", ["msrvtt", "didemo"])
    model = Path(write_stub(tmp_path / "model"))
    assert entry(run_on(model, bench, out), "didemo")["score"] == 1

    def swap(config, rows):
        if config != "didemo-qrels":
            return rows
        return [{**row, "corpus-id": f"v{(place + 1) % N_CORPUS}"} for place, row in enumerate(rows)]

    write_benchmark(tmp_path / "bench", ["msrvtt", "didemo"], change=swap)
    calls = stub_log.read_text()
    results = run_on(model, bench, out)
    assert [entry(results, key)["score"] for key in ("msrvtt", "didemo")] == [1, 0]
    assert stub_log.read_text() == calls  # other answers, same vectors
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "shift": 1}))
    assert [entry(run_on(model, bench, out), key)["score"] for key in ("msrvtt", "didemo")] == [0, 1]


def run_on(model, bench, out):
    return run(RunArguments(str(model), bench, out, ["msrvtt", "didemo"]))


def test_broken_items_are_skipped_named_and_counted_as_misses(stub, stub_log, tmp_path):
    def break_some(config, rows):
        if config == "vdc_o-corpus":
            rows[3] = {**rows[3], "video": {"bytes": b"broken", "path": None}}
        if config == "vdc_o-queries":
            rows[5] = {**rows[5], "text": "broken"}
        return rows

    bench = write_benchmark(tmp_path / "bench", ["vdc_o"], change=break_some)
    results = run(RunArguments(stub, bench, str(tmp_path / "out"), ["vdc_o"]))
    assert entry(results, "vdc_o")["skipped"] == {
        "corpus": [{"id": "v3", "reason": "no frames"}],
        "queries": [{"id": "q5", "reason": "no frames"}],
    }
    assert entry(results, "vdc_o")["score"] == pytest.approx(10 / 12)
    low, high = entry(results, "vdc_o")["interval"]
    assert 0.5 < low < 10 / 12 < high <= 1  # 12 queries, a standard error of 0.11
    text = (tmp_path / "out" / "results.md").read_text()
    assert "stub: vdc_o corpus v3: no frames" in text


def files(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_and_resume(seed, reference, stub, benchmark, out):
    """Ends a run by SIGKILL after a random number of the reference run's files, resumes it, compares every byte."""
    command = [sys.executable, SCRIPT, "--model", stub, "--benchmark", benchmark, "--output", out, "--batch_size", "2"]
    command += ["--datasets", *KILLED, "--baseline", "random", "--truncate_dim", "16", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rng = random.Random(seed)
    n_files = rng.randrange(len(reference))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(path.is_file() for path in out.rglob("*")) < n_files:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    process.kill()
    process.wait()
    (out / "embeddings").mkdir(parents=True, exist_ok=True)
    (out / "embeddings" / "half.npz.1.tmp").write_bytes(b"half")  # what a kill within a write leaves
    run(killed_arguments(stub, benchmark, out))
    assert files(out) == reference
    return process.returncode


KILLED = ["crb_s", "crb_t", "ms_ti"]


def killed_arguments(stub, benchmark, out):
    return RunArguments(stub, benchmark, str(out), KILLED, ["random"], batch_size=2, truncate_dim=[16, 8])


@pytest.mark.parametrize(
    "seeds", [pytest.param([0], id="one"), pytest.param(range(1, 11), id="ten", marks=pytest.mark.slow)]
)
def test_sigkill_and_resume_give_the_same_bytes(benchmark, stub, stub_log, tmp_path, seeds):
    run(killed_arguments(stub, benchmark, tmp_path / "whole"))
    reference = files(tmp_path / "whole")
    codes = [kill_and_resume(seed, reference, stub, benchmark, tmp_path / f"run{seed}") for seed in seeds]
    assert -signal.SIGKILL in codes


def test_two_processes_give_the_results_of_one(benchmark, stub, stub_log, tmp_path):
    keys = ["crb_s", "crb_t", "ms_ti"]
    run(RunArguments(stub, benchmark, str(tmp_path / "one"), keys, batch_size=3))
    stub_log.unlink()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, SCRIPT, "--model", stub, "--benchmark", benchmark, "--output", tmp_path / "two"]
    command += ["--batch_size", "3"]  # chunks of 6: two a side, one for each process
    extra = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--datasets", *keys], env={**os.environ, **extra}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.split(" ", 2)[:2] for line in stub_log.read_text().splitlines()]
    assert sorted(calls) == [[rank, str(N_CORPUS // 2)] for rank in "01" for _ in range(len(keys) + 2)]
    assert done.stdout.count("| ms_ti") == 1  # the main process alone prints
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_processes_that_do_not_see_each_other_are_told(benchmark, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UvrbError, match="2 processes were started, each on its own.*ACCELERATE_USE_CPU=true"):
        run(RunArguments(stub, benchmark, str(tmp_path / "out")))


def call(monkeypatch, capsys, *arguments):
    """Exit code and error lines of the command line."""
    monkeypatch.setattr(sys, "argv", ["run_uvrb.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--datasets": "msrvttt"}, "Unknown dataset key(s) msrvttt; choose from msrvtt, didemo"),
        ({"--benchmark": "./nowhere"}, "No benchmark at ./nowhere: build it first"),
        ({"--model": "./nowhere"}, "No model at ./nowhere: give the folder"),
        ({"--baseline": "./nowhere"}, "No model at ./nowhere: give the folder"),
        ({"--batch_size": "0"}, "batch_size is 0"),
        ({"--dtype": "int3"}, "dtype is 'int3'; choose auto"),
        ({"--precision": "int3"}, "precision is 'int3'; choose float32"),
        ({"--num_frames": "0"}, "num_frames is 0"),
        ({"--datasets": "msrvtt", "--reverse_time": "crb_t"}, "reverse_time names crb_t, which is not scored"),
        ({"--classification": "./nowhere"}, "No classification set at ./nowhere"),
    ],
)
def test_what_the_caller_can_mend_ends_in_one_line(benchmark, stub, tmp_path, monkeypatch, capsys, changes, message):
    good = {"--model": stub, "--benchmark": benchmark, "--output": tmp_path / "out"}
    code, lines = call(monkeypatch, capsys, *(part for pair in {**good, **changes}.items() for part in pair))
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("run_uvrb: ") and message in lines[0]


def drop_positive(config, rows):
    return rows[1:] if config == "msrvtt-qrels" else rows


def drop_video(config, rows):
    return rows[1:] if config == "msrvtt-corpus" else rows


def empty_list(config, rows):
    return [{**row, "corpus-ids": []} for row in rows] if config == "ms_ti-top_ranked" else rows


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("msrvtt", drop_positive, "msrvtt: query 'q0' has no relevant video in msrvtt-qrels"),
        ("msrvtt", drop_video, "msrvtt-qrels names 'v0', which msrvtt-corpus lacks"),
        ("ms_ti", empty_list, "ms_ti: query 'q0' has no list in ms_ti-top_ranked"),
        ("didemo", None, "lacks didemo-corpus, didemo-queries, didemo-qrels"),
    ],
)
def test_a_benchmark_that_does_not_fit_is_named(stub, tmp_path, monkeypatch, capsys, key, change, message):
    bench = write_benchmark(tmp_path / "bench", ["msrvtt", "ms_ti"], change=change)
    arguments = ("--model", stub, "--benchmark", bench, "--output", tmp_path / "out", "--datasets", key)
    code, lines = call(monkeypatch, capsys, *arguments)
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_a_folder_that_is_no_model_repo_is_named(benchmark, backbone_checkpoint, tmp_path, monkeypatch, capsys):
    good = ("--benchmark", benchmark, "--output", tmp_path / "out", "--datasets", "ms_ti", "--model")
    code, lines = call(monkeypatch, capsys, *good, tmp_path)
    assert code == 2 and lines == [f"run_uvrb: No model at {tmp_path}: the folder has no config.json."]
    code, lines = call(monkeypatch, capsys, *good, backbone_checkpoint)  # its processor is missing
    assert code == 2 and f"Cannot load the model at {backbone_checkpoint}" in lines[-1]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "bert")
    code, lines = call(monkeypatch, capsys, *good, tmp_path / "bert")
    assert code == 2 and "without `encode`; give a GVE repo" in lines[-1]


def test_command_line_as_a_user_calls_it(benchmark, stub, tmp_path):
    command = [sys.executable, SCRIPT, "--model", stub, "--benchmark", benchmark, "--output", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--datasets", "nope"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("run_uvrb: Unknown dataset key(s) nope")
    assert "Traceback" not in done.stderr


def test_sweep_and_intervals(benchmark, stub, stub_log, tmp_path):
    """Every combination, in order; all but the number of frames come from the same embeddings."""
    args = RunArguments(
        *(stub, benchmark, str(tmp_path), ["ms_ti", "ms_tv"]), truncate_dim=[16, 2], precision=["float32", "ubinary"]
    )
    results = run(args)
    assert len(stub_log.read_text().splitlines()) == 4
    settings = [(each["setting"]["truncate_dim"], each["setting"]["precision"]) for each in results["sweep"]]
    assert settings == [(16, "float32"), (16, "ubinary"), (2, "float32"), (2, "ubinary")]
    assert [each["datasets"]["ms_ti"]["bytes_per_vector"] for each in results["sweep"]] == [64, 2, 8, 1]
    scores = [each["abilities"]["CMP"] for each in results["sweep"]]
    assert scores[0] == 1.0 > scores[3]  # two signs tell at most four videos apart
    assert results["models"][0]["setting"] == results["sweep"][0]["setting"]
    assert entry(results, "ms_ti")["interval"] == [1.0, 1.0] and entry(results, "ms_ti")["misses"] == []
    text = (tmp_path / "results.md").read_text()
    assert "## Test-time scaling" in text and text.count("ubinary") == 2
    with pytest.raises(UvrbError, match="truncate_dim is 17; the model's vectors have 16"):
        run(RunArguments(stub, benchmark, str(tmp_path), ["ms_ti"], truncate_dim=[17]))


def test_worst_misses_are_the_furthest_down(benchmark, stub_log, tmp_path):
    wrong = write_stub(tmp_path / "wrong", shift=1)
    results = run(RunArguments(wrong, benchmark, str(tmp_path / "out"), ["msrvtt"]))
    misses = entry(results, "msrvtt")["misses"]
    assert len(misses) == 3 and misses[0]["rank"] >= misses[1]["rank"] >= misses[2]["rank"] > 1
    for miss in misses:
        number = int(miss["query"][1:])
        assert miss["relevant"] == f"v{number}" and miss["retrieved"] == f"v{(number + 1) % N_CORPUS}"


def test_report_holds_everything_and_loads_nothing(benchmark, stub_log, tmp_path):
    wrong = write_stub(tmp_path / "wrong", shift=1)
    results = run(RunArguments(wrong, benchmark, str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|<script|@import|url\(", page)
    for part in ("data:image/png;base64,", "GVE-7B", "Worst misses", "Spearman above", "do not compare"):
        assert part in page
    for miss in entry(results, "crb_t")["misses"][:1]:
        assert f"crb_t: {miss['query']}" in page and f"at rank {miss['rank']}: {miss['relevant']}" in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


class Balance(HTMLParser):
    """Tags that are still open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_random_directions_depend_on_content_only():
    items = [{"text": "a"}, {"video": media("video", 1)}]
    encoder = RandomEncoder()
    both = encoder.encode(items, None, [])
    assert (both[1] == encoder.encode(items[1:], "another instruction", [])[0]).all()
    assert (both[0] != both[1]).all()
