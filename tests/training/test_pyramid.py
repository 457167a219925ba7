"""The recipe as users run it: in processes of its own, killed, resumed, on two ranks, with mistakes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import InitProcessGroupKwargs
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny_runs import SCRIPT, STEPS, environment, launcher, steps_of, words_of

from training.checkpoint import lock_run
from training.prepare import PATIENCE, start_accelerator
from training.pyramid import main


EVERY_TASK = ["--sigma_min", "1", "--seed", "1"]  # what four steps draw then


@pytest.fixture(scope="session")
def whole_run(recipe, tmp_path_factory):
    """Output directory of an uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("whole")
    main(words_of(recipe, output_dir))
    return output_dir


def test_record_of_a_run(whole_run):
    record = json.loads((whole_run / "training_run.json").read_text())
    assert record["data"]["tasks"]["t2v"] == {
        "pairs": 15,
        "batches": sum(step["task"] == "t2v" for step in steps_of(whole_run)),
        "batch_size": 4,
        "hard_negatives": 2,
    }
    assert record["settings"]["temperature"] == 0.03
    assert [plan["sigma"] for plan in record["curriculum"]] == pytest.approx([0.1, 0.55, 1.0])
    assert all(sum(plan["probabilities"].values()) == pytest.approx(1) for plan in record["curriculum"])
    assert all(sum(plan["draws"].values()) == STEPS // 3 for plan in record["curriculum"])
    assert record["data"]["skipped"] == 2
    skipped = [json.loads(line) for line in (whole_run / "run/skipped.jsonl").read_text().splitlines()]
    assert [(each["task"], each["row"], each["side"]) for each in skipped] == [
        ("t2v", 3, "target"),
        ("t2v", 5, "negative 0"),
    ]


def test_checkpoints_hold_what_learns_and_rotate(whole_run):
    folders = sorted((whole_run / "run").glob("checkpoint-*"))
    assert [folder.name[-2:] for folder in folders] == ["10", "12"]
    saved, trained = load_file(folders[1] / "trained.safetensors"), load_file(whole_run / "model.safetensors")
    assert not any("visual" in name for name in saved)
    assert {name.removeprefix("model.") for name in saved} == {name for name in trained if "visual" not in name}
    assert all(trained[name.removeprefix("model.")].equal(tensor) for name, tensor in saved.items())


def test_log_of_every_step(whole_run):
    steps = steps_of(whole_run)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert {"task", "loss", "positive", "relevance", "gap", "masked", "learning_rate", "seconds"} <= steps[0].keys()
    rates = [step["learning_rate"] for step in steps]
    assert max(rates) == pytest.approx(0.002)
    assert rates.index(max(rates)) == 1  # one step of warmup
    assert rates[-1] < 0.0001


def test_a_repo_says_which_leading_dimensions_it_was_trained_for(recipe, tmp_path):
    main(words_of(recipe, tmp_path, "--matryoshka_dims", "8", "16", "--epochs", "1", "--steps_per_epoch", "1"))
    assert json.loads((tmp_path / "config.json").read_text())["matryoshka_dims"] == [16, 8]


def test_saved_repo_loads(whole_run, tmp_path):
    """From another directory, with nothing of this project on the path."""
    script = (
        "import sys, torch; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "rows = model.encode(['clip 1: green', 'clip 2: blue'])\n"
        "assert rows.shape == (2, 32) and torch.isfinite(rows).all()\n"
    )
    clean = {name: value for name, value in environment(HF_HOME=str(tmp_path)).items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", script, str(whole_run)]
    done = subprocess.run(words, env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_killed_run_resumes_to_the_same_weights(whole_run, recipe, tmp_path, capfd):
    process = subprocess.Popen([*SCRIPT, *words_of(recipe, tmp_path)], env=environment())
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/log.jsonl").exists() or len(steps_of(tmp_path)) < 7:
        assert process.poll() is None, capfd.readouterr().err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model.safetensors").exists()

    main(words_of(recipe, tmp_path))
    assert "resuming from" in capfd.readouterr().out
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole_run, tmp_path))
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)
    for one, other in zip(steps_of(whole_run), steps_of(tmp_path), strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}

    with pytest.raises(SystemExit):
        main(words_of(recipe, tmp_path, "--seed", "1"))
    message = "is of a run with other settings (seed 42 -> 1): set overwrite, or another run_dir"
    assert message in capfd.readouterr().err


def test_other_content_under_the_same_names_is_another_run(whole_run, recipe, tmp_path, capsys):
    shutil.copytree(whole_run / "run", tmp_path / "run")
    for words, changed in (
        (["--max_pairs", "14"], "max_pairs None -> 14, pairs_content "),
        (["--model", str(whole_run)], "starting_weights "),
    ):
        with pytest.raises(SystemExit):
            main(words_of(recipe, tmp_path, *words))
        assert changed in capsys.readouterr().err


def test_a_checkpoint_of_other_weights_is_refused(whole_run, recipe, tmp_path):
    """Nothing would be restored under other names, and the run go on from where it started."""
    shutil.copytree(whole_run / "run", tmp_path / "run")
    for path in tmp_path.glob("run/checkpoint-*/trained.safetensors"):
        save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="holds other weights than those that learn, such as .*: set overwrite"):
        main(words_of(recipe, tmp_path))


def test_first_epoch_is_scored_by_the_prober(whole_run, recipe, tmp_path):
    """Another model as prober gives the R_k that it gives as the model itself; then the weights have their say."""
    for name, words in (("probed", ["--prober", str(whole_run)]), ("itself", ["--model", str(whole_run)])):
        main(words_of(recipe, tmp_path / name, *words, "--epochs", "2", "--steps_per_epoch", "1"))
    probed, itself = (
        json.loads((tmp_path / name / "training_run.json").read_text())["curriculum"] for name in ("probed", "itself")
    )
    assert probed[0]["relevance"] == pytest.approx(itself[0]["relevance"], abs=1e-5)
    assert probed[1]["relevance"] != pytest.approx(itself[1]["relevance"], abs=1e-3)
    base = json.loads((whole_run / "training_run.json").read_text())["curriculum"]
    assert probed[0]["relevance"] != pytest.approx(base[0]["relevance"], abs=1e-3)


@pytest.fixture(scope="module")
def mining(pairs_repo):
    """Settings of a run that mines from 16 videos and probes 7 pairs: three ranks share both out unevenly.

    The vision tower learns: the last backward pass of a batch, which joins gradients, may be of texts alone.
    """
    pytest.importorskip("faiss")
    words = ["--negative_corpus", f"{pairs_repo}:i2v", "--mine_relative_margin", "1", "--probe_pairs", "7"]
    return [*words, *EVERY_TASK, "--hard_negatives", "2", "--epochs", "1", "--freeze_vision", "false"]


@pytest.fixture(scope="module")
def joined_run(recipe, mining, tmp_path_factory):
    """Output directory of one rank with batches of 6."""
    output_dir = tmp_path_factory.mktemp("one")
    main(words_of(recipe, output_dir, *mining, "--batch_size", "6"))
    return output_dir


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one(joined_run, recipe, mining, tmp_path, ranks):
    """Ranks that share batches of 6, with gradient caching, draw, mine and learn what one does from whole ones."""
    settings = ["--batch_size", str(6 // ranks), "--micro_batch_size", "2", "--loader_workers", "1"]
    words = [*SCRIPT[1:], *words_of(recipe, tmp_path, *mining, *settings)]
    env = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run([*launcher(ranks), *words], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    records = [json.loads((folder / "training_run.json").read_text()) for folder in (joined_run, tmp_path)]
    assert records[1]["settings"]["world_size"] == ranks
    [one], [several] = (record["curriculum"] for record in records)
    assert several["relevance"] == pytest.approx(one["relevance"], abs=1e-5)
    assert several["draws"] == one["draws"]
    one, several = (
        json.loads((folder / f"run/checkpoint-{STEPS // 3:08d}/progress.json").read_text())["mined"]
        for folder in (joined_run, tmp_path)
    )
    assert one == several
    assert all(one.values())  # every task has found some
    assert {step["task"] for step in steps_of(joined_run)} == {"t2t", "t2v", "i2v"}
    for one, several in zip(steps_of(joined_run), steps_of(tmp_path), strict=True):
        assert one["task"] == several["task"]
        for name in ("loss", "positive", "gap", "grad_norm"):
            assert one[name] == pytest.approx(several[name], rel=1e-3, abs=1e-4), (one["step"], name)


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
KINDS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
    "fsdp2": {},
}


def run_of_two(kind, words, output_dir, precision="no"):
    """A run of two CPU ranks under DDP, FSDP2 or DeepSpeed; what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_endpoint", "127.0.0.1:0"]
    launch += ["--rdzv_backend", "c10d"]
    launch += [str(Path(__file__).with_name("fsdp2_on_cpus.py"))] if kind == "fsdp2" else SCRIPT[1:]
    env = environment(ACCELERATE_MIXED_PRECISION=precision, **KINDS[kind])
    done = subprocess.run([*launch, *words], env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert json.loads((output_dir / "training_run.json").read_text())["settings"]["world_size"] == 2
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_shards_equal_ddp(recipe, whole_run, mining, tmp_path, kind, micro_batch_size):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed")
    settings = ["--batch_size", "2", "--epochs", "1", "--learning_rate", "1e-3", "--prober", str(whole_run)]
    settings += EVERY_TASK
    if micro_batch_size is not None:
        settings += ["--micro_batch_size", str(micro_batch_size), *mining]
    for each in ("ddp", kind):
        run_of_two(each, words_of(recipe, tmp_path / each, *settings), tmp_path / each)
    assert {step["task"] for step in steps_of(tmp_path / "ddp")} == {"t2t", "t2v", "i2v"}
    for one, other in zip(steps_of(tmp_path / "ddp"), steps_of(tmp_path / kind), strict=True):
        assert (one["task"], one["loss"]) == (other["task"], pytest.approx(other["loss"], abs=1e-5))
    records = [json.loads((tmp_path / each / "training_run.json").read_text()) for each in ("ddp", kind)]
    assert records[0]["settings"]["starting_weights"] == records[1]["settings"]["starting_weights"]
    assert records[0]["curriculum"] == records[1]["curriculum"]
    progress = [(tmp_path / each / "run/checkpoint-00000004/progress.json").read_text() for each in ("ddp", kind)]
    mined = [json.loads(each)["mined"] for each in progress]
    assert mined[0] == mined[1] and bool(mined[0]) == (micro_batch_size is not None)
    ddp, shards = (load_file(tmp_path / each / "model.safetensors") for each in ("ddp", kind))
    for name, tensor in ddp.items():
        torch.testing.assert_close(shards[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_fsdp2_in_bfloat16_equals_ddp(recipe, mining, tmp_path):
    """The clock of videos, embeddings and sums of gradients are not rounded; negatives are mined by the embeddings."""
    settings = ["--batch_size", "2", "--epochs", "1", "--method", "lora", "--lora_rank", "2", "--lora_dropout", "0"]
    settings += ["--dtype", "bfloat16", "--schedule", "uniform", "--micro_batch_size", "2", *mining]
    for kind in ("ddp", "fsdp2"):
        run_of_two(kind, words_of(recipe, tmp_path / kind, *settings), tmp_path / kind, "bf16")
    for one, other in zip(steps_of(tmp_path / "ddp"), steps_of(tmp_path / "fsdp2"), strict=True):
        for name in ("loss", "grad_norm", "gap"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), (one["step"], name)


@pytest.mark.slow
def test_fsdp2_resumes_before_the_first_picture(recipe, tmp_path):
    """Its vision tower has no optimizer state of its own yet; the trained repo is in the precision of its start."""
    settings = ["--batch_size", "2", "--epochs", "1", "--save_total_limit", "9", "--dtype", "bfloat16"]
    settings += ["--tasks", "t2t", "--task_hard_negatives", "t2t=0", "--freeze_vision", "false"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_of_two("fsdp2", words_of(recipe, whole, *settings), whole, "bf16")
    checkpoint = Path("run/checkpoint-00000002")
    (resumed / "run").mkdir(parents=True)
    (whole / checkpoint).rename(resumed / checkpoint)
    assert "resuming from" in run_of_two("fsdp2", words_of(recipe, resumed, *settings), resumed, "bf16")
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((resumed / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_zero_resumes_from_what_learns(recipe, base_model, tmp_path, kind, method):
    """To the same weights, although its checkpoints leave frozen ones out."""
    pytest.importorskip("deepspeed")
    settings = ["--batch_size", "2", "--epochs", "1", "--save_total_limit", "9", "--method", method, *EVERY_TASK]
    if method == "lora":
        settings += ["--lora_rank", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_of_two(kind, words_of(recipe, whole, *settings), whole)
    checkpoint = Path("run/checkpoint-00000002")
    (resumed / "run").mkdir(parents=True)
    (whole / checkpoint).rename(resumed / checkpoint)
    states = list((resumed / checkpoint).rglob("*model_states.pt"))
    assert all(path.name.startswith("zero_pp_rank") for path in states) == (kind == "zero3")  # a part on each rank
    saved = sum(path.stat().st_size for path in states)
    assert saved < (base_model / "model.safetensors").stat().st_size / 2
    assert "resuming from" in run_of_two(kind, words_of(recipe, resumed, *settings), resumed)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_two_runs_cannot_train_into_one_folder(recipe, tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from training.checkpoint import lock_run; f = lock_run({str(tmp_path / 'run')!r}); "
            "print('held', flush=True); input()",
        ],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* trains into .*run: end it, or set another"):
        lock_run(tmp_path / "run")
    holder.kill()
    holder.communicate()
    lock_run(tmp_path / "run").close()


def test_a_folder_that_cannot_be_written(recipe, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(words_of(recipe, tmp_path / "file"))
    message = f"pyramid.py: cannot write to run_dir {tmp_path}/file/run: Not a directory; set run_dir or output_dir\n"
    assert capsys.readouterr().err.endswith(message)


def tree(process):
    """A launcher and its ranks, which its process group does not hold: torch gives each a session."""
    return [process, *psutil.Process(process.pid).children(recursive=True)]


def kill_tree(process):
    """SIGKILL for a launcher and its ranks."""
    killed = tree(process)
    for each in killed:
        each.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(killed[1:])


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps(recipe, tmp_path, ranks, streaming):
    """SIGKILL at ten random moments of a run, and each time the same command again."""
    launch = SCRIPT if ranks == 1 else [*launcher(ranks), *SCRIPT[1:]]
    settings = ["--batch_size", str(4 // ranks), "--steps_per_epoch", "14", "--save_steps", "3"]
    settings += ["--streaming", "--window_pairs", "8"] if streaming else []
    env = environment(ACCELERATE_USE_CPU="true")

    def start(output_dir):
        words = [*launch, *words_of(recipe, output_dir, *settings)]
        return subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    killed, generator = tmp_path / "killed", random.Random(f"{ranks} {streaming}")
    for target in sorted(generator.sample(range(2, 41), 10)):
        process = start(killed)
        # The log may hold the target's step from before the last kill: the ranks are there first.
        log, processes = killed / "run/log.jsonl", 1 if ranks == 1 else 1 + ranks
        while not log.exists() or len(steps_of(killed)) < target or len(tree(process)) < processes:
            assert process.poll() is None
            time.sleep(0.02)
        kill_tree(process)
    assert start(killed).wait() == 0
    record = json.loads((killed / "training_run.json").read_text())
    assert record["settings"]["world_size"] == ranks
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert all(expected[name].equal(resumed[name]) for name in expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tempreature", "0.1"], "unknown setting tempreature on the command line; did you mean temperature?"),
        (["--temperature", "7"], "temperature must be a number from 0.001 to 1.0 (the paper: 0.03), got 7.0"),
        (["--tasks", "t2v", "x2y", "--task_hard_negatives", "t2v=1"], "tasks names x2y, but"),
        (["--model", "no/such-model"], "cannot start from model 'no/such-model'"),
        (["--negative_corpus", "x", "--mine_top_k", "1"], "must be at least 2, the hard_negatives of t2v, got 1"),
        (["--task_batch_size", "t2v=99"], "task 't2v' has 15 pairs, too few distinct pairs for one batch of 99"),
    ],
)
def test_mistakes_end_in_one_line(recipe, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words_of(recipe, tmp_path, *words))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pyramid.py: ")
    assert message in error


def test_a_tracker_that_is_not_installed(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.prepare.get_available_trackers", lambda: [])
    with pytest.raises(SystemExit):
        main(words_of(recipe, tmp_path, "--report_to", "trackio"))
    message = "report_to names trackio, which is not installed: pip install trackio"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "renames", "message"),
    [
        (2, True, "fsdp_activation_checkpointing is not for this: set gradient_checkpointing"),
        (1, False, "fsdp_version must be 2, as in accelerate/fsdp2.yaml, got 1"),
    ],
)
def test_fsdp_that_cannot_train_gve(monkeypatch, tmp_path, version, renames, message):
    """Its own activation checkpointing renames layers: a LoRA run ended with an empty adapter."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version, activation_checkpointing=renames))
    fsdp = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    monkeypatch.setattr("training.prepare.Accelerator", lambda **_: fsdp)
    with pytest.raises(ValueError, match=message):
        start_accelerator(SimpleNamespace(report_to=[], run_dir=tmp_path))


@pytest.mark.parametrize(("kind", "stage"), [(DistributedType.FSDP, None), (DistributedType.DEEPSPEED, 3)])
def test_a_packed_base_is_not_for_shards(recipe, tmp_path, monkeypatch, capsys, kind, stage):
    """bitsandbytes' weights lost their scales when they were cut, or were cut before they were packed."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    accelerator = SimpleNamespace(distributed_type=kind, state=state)
    monkeypatch.setattr("training.prepare.start_accelerator", lambda training: accelerator)
    with pytest.raises(SystemExit):
        main(words_of(recipe, tmp_path, "--method", "lora", "--quantization", "4bit"))
    message = "pyramid.py: quantization needs whole weights on every GPU: use DDP or ZeRO-2, not FSDP or ZeRO-3\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("deepspeed", "backend"), [("false", None), ("true", "gloo")])
def test_ranks_wait_for_the_one_that_decodes(monkeypatch, tmp_path, deepspeed, backend):
    monkeypatch.setattr("training.prepare.Accelerator", lambda **made: SimpleNamespace(distributed_type=None, **made))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", deepspeed)
    handlers = start_accelerator(SimpleNamespace(report_to=[], run_dir=tmp_path)).kwargs_handlers
    group = [handler.to_kwargs() for handler in handlers if isinstance(handler, InitProcessGroupKwargs)]
    assert group == [{"timeout": PATIENCE} | ({"backend": backend} if backend else {})]


def test_a_wrong_config_key_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(words_of(tmp_path / "bad.yaml", tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "pyramid.py: unknown setting learning_rat in the config file; did you mean learning_rate?\n"
    )
