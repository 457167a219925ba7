"""Speed and memory of a training step, measured in processes of their own.

```bash
python -m training.benchmark memory   # gradient caching: a batch of 1,024 in the memory of 64
python -m training.benchmark speed    # pairs a second beside sentence-transformers' trainer
```

`memory` reports the peak above the model and the collated batch, `speed` the rate of a whole training run and the peak
of its process; both trainers get the same starting weights, pairs, tokens, batch and micro-batch, take turns, and
train all weights, or with `--freeze_vision` all but the vision tower's. Both rates include reading each picture and
video once: ours decodes them before the first step, and that time is added; the other decodes at each step, videos by
our decoder. Linux only: `speed` takes its peaks from the kernel (VmHWM), `memory` samples.
"""

import argparse
import gc
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from dataset_builders.mini.render import encode_mp4
from hub_cards.repos import run_command
from modeling_gve import GVEModel, PreparedItem
from modeling_gve.configuration_gve import DEFAULT_INSTRUCTION
from modeling_gve.video_gve import decode_video
from training.arguments import ModelArguments
from training.collate import PairCollator
from training.gradcache import cached_step
from training.losses import symmetric_info_nce
from training.malloc import keep_freed_memory, return_freed_memory
from training.pairs import FrameStore, PairStream, available_cores
from training.record import StepLog
from training.weights import load_model


BASE = Path(__file__).with_name("gve-mini-base")
TOKENS_PER_FRAME = 17
SIDE = 56  # pixels
NUM_FRAMES = 8
TEMPERATURE = 0.03
MIB = 2**20
DECODE, COLLATE, EMBED, LEARN, UPDATE = PARTS = (
    "decode, once",
    "collate",
    "forward without gradients",
    "forward and backward",
    "optimizer",
)


def peak_bytes(reset=False):
    """Most memory this process has had in RAM since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class AnonymousPeak:
    """Most anonymous memory of this process inside the block, in `bytes`, above what it held when the block began.

    Freed memory is given back first: a large batch's collation leaves much of it, and a step that takes it up again
    would seem to need none. Pages of files are left out, for the kernel takes them away when it likes.
    """

    def __enter__(self):
        gc.collect()
        return_freed_memory()
        self._before = self._highest = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.bytes = self._highest - self._before

    def _watch(self):
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._now())

    @staticmethod
    def _now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_memory(batch_size, micro_batch_size, model=BASE):
    """Peak bytes of one cached step of text-to-video pairs, above the model and the collated batch."""
    keep_freed_memory()  # as training does
    model, processor = load_model(ModelArguments(model=str(model), max_tokens_per_frame=TOKENS_PER_FRAME))
    collator, generator = PairCollator(processor), np.random.default_rng(0)
    model.train()

    def items(count):
        texts = [PreparedItem("Find the video.", f"a scene, number {index}") for index in range(count)]
        frames = generator.integers(0, 256, (count, NUM_FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        return texts + [PreparedItem("", "", frames=each, times=np.arange(NUM_FRAMES)) for each in frames]

    def step(count):
        groups, places = collator.forward_groups(items(count), micro_batch_size)
        with AnonymousPeak() as peak:
            cached_step(
                lambda group: model(**group).embeddings,
                groups,
                lambda rows: symmetric_info_nce(*rows[places].chunk(2), temperature=TEMPERATURE),
                torch.Tensor.backward,
                torch.device("cpu"),
            )
        return peak.bytes

    step(2)  # gradients and the libraries' buffers exist from here on
    return {"bytes": step(batch_size)}


class Stopwatch:
    """Seconds spent in the parts of a training step; for a process of its own, since what it wraps stays wrapped.

    Attributes:
        seconds (`Counter`): by part, so far.
        steps (list of `Counter`): the same at the end of every step.
    """

    def __init__(self):
        self.seconds, self.steps = Counter(), []
        self._watch(FrameStore, "put", DECODE)
        self._watch(FrameStore, "seal", DECODE)
        for owner, name in ((PairStream, "draw"), (PairCollator, "batch"), (PairCollator, "forward_groups")):
            self._watch(owner, name, COLLATE)
        self._watch(GVEModel, "forward", LEARN, without_gradients=EMBED)
        self._watch(Accelerator, "backward", LEARN)
        self._watch(Accelerator, "clip_grad_norm_", UPDATE)
        self._watch(torch.optim.AdamW, "step", UPDATE)
        self._watch(StepLog, "write", None)

    def _watch(self, owner, name, part, without_gradients=None):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if part is None:
                    self.steps += [Counter(self.seconds)] * ("loss" in args[1])
                else:
                    alone = without_gradients is not None and not torch.is_grad_enabled()
                    self.seconds[without_gradients if alone else part] += time.perf_counter() - started

        setattr(owner, name, timed)


def write_pairs(folder, task, count):
    """A pairs repo of random texts, pictures and videos, the same at every call."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from datasets import Video as VideoFeature

    media = {"text": Value("string"), "image": ImageFeature(), "video": VideoFeature()}
    features = {f"{side}_{kind}": each for side in ("query", "target") for kind, each in media.items()}
    features |= {"negatives": List(dict(media)), "instruction": Value("string")}
    features |= {"task": Value("string"), "source_id": Value("string")}
    generator, rows = np.random.default_rng(0), []
    for _ in range(count):
        row = dict.fromkeys(features) | {"query_text": random_text(generator), "negatives": [], "task": task}
        if task == "t2t":
            row["target_text"] = random_text(generator)
        elif task == "t2v":
            frames = generator.integers(0, 256, (NUM_FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
            row["target_video"] = {"bytes": encode_mp4(frames), "path": None}
        else:
            picture = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(picture, "png")
            row["target_image"] = {"bytes": picture.getvalue(), "path": None}
        rows.append(row)
    path = Path(folder) / task / "train.parquet"
    path.parent.mkdir(parents=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    card = (
        f"---\nconfigs:\n- config_name: {task}\n  data_files:\n  - split: train\n    path: {task}/train.parquet\n---\n"
    )
    (Path(folder) / "README.md").write_text(card)


def random_text(generator):
    """Some words, of heavy-tailed number as queries are."""
    words = ("red", "blue", "circle", "square", "moves", "left", "right", "behind", "a", "the", "slowly", "turns")
    return " ".join(generator.choice(words, size=int(np.clip(generator.lognormal(2.5, 0.7), 3, 100))))


def measure_gve(pairs, task, batch_size, micro_batch_size, steps, seed, threads, freeze_vision=False):
    """Rate and peak of `pyramid.py`."""
    from training.pyramid import prepare, train

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": BASE,
            "max_tokens_per_frame": TOKENS_PER_FRAME,
            "pairs": pairs,
            "tasks": task,
            "output_dir": folder,
            "batch_size": batch_size,
            "hard_negatives": 0,
            "micro_batch_size": micro_batch_size,
            "epochs": 1,
            "steps_per_epoch": steps,
            "save_steps": steps,
            "probe_pairs": 1,
            "seed": seed,
            "cpu_threads": threads,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        watch = Stopwatch()
        frozen = str(freeze_vision).lower()
        run = prepare([*words, "--freeze_vision", frozen, "--remember_vision", frozen])
        peak_bytes(reset=True)
        train(run)
        lines = [json.loads(line) for line in (Path(folder) / "run/log.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines if "loss" in line]
    timed = len(times) - 1  # the first step warms up
    seconds = {part: watch.steps[-1][part] - watch.steps[0][part] for part in PARTS}
    seconds["other"] = times[-1] - times[0] - sum(seconds.values())
    seconds[DECODE] = watch.seconds[DECODE] * timed / steps
    return {
        "pairs_per_second": timed * batch_size / sum(seconds.values()),
        "bytes": peak_bytes(),
        "ms_a_pair": {part: 1000 * spent / (timed * batch_size) for part, spent in seconds.items()},
    }


def sentence_transformer():
    """The base as a sentence-transformers model that embeds the tokens that GVE does: its system text and its end."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(BASE))
    system = f"<|im_start|>system\n{DEFAULT_INSTRUCTION}<|im_end|>\n"
    template = transformer.processor.chat_template
    transformer.processor.chat_template = f"{system}{template}<|im_start|>assistant\n<|endoftext|>"
    size = transformer.get_embedding_dimension()
    return SentenceTransformer(modules=[transformer, Pooling(size, pooling_mode="lasttoken"), Normalize()])


def with_frames(rows):
    """Rows whose videos are frames with their clock, as sentence-transformers takes them."""
    videos = []
    for video in rows["target_video"]:
        frames, times = decode_video(video["bytes"], NUM_FRAMES)
        clock = {"fps": 1 / (times[1] - times[0]), "total_num_frames": NUM_FRAMES}
        clock |= {"duration": times[-1] + times[1], "frames_indices": list(range(NUM_FRAMES))}
        videos.append({"array": torch.from_numpy(frames).movedim(-1, 1), "video_metadata": clock})
    return {"query_text": rows["query_text"], "target_video": videos}


def measure_sentence_transformers(
    pairs, task, batch_size, micro_batch_size, steps, seed, threads, freeze_vision=False
):
    """Rate and peak of sentence-transformers' trainer with CachedMultipleNegativesRankingLoss."""
    from datasets import Video, load_dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, *_, **__):
            self.times.append(time.monotonic())

    torch.set_num_threads(threads)
    model = sentence_transformer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (freeze_vision and ".visual." in name))
    target = {"t2t": "target_text", "t2i": "target_image", "t2v": "target_video"}[task]
    rows = load_dataset(pairs, task, split="train").select_columns(["query_text", target])
    if task == "t2v":
        rows = rows.cast_column(target, Video(decode=False)).with_transform(with_frames)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=3e-5,
            weight_decay=0.1,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=micro_batch_size)
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[Clock()]
        )
        peak_bytes(reset=True)
        trainer.train()
    elapsed = Clock.times[-1] - Clock.times[0]
    return {"pairs_per_second": (len(Clock.times) - 1) * batch_size / elapsed, "bytes": peak_bytes()}


MEASURES = {
    "memory": measure_memory,
    "gve": measure_gve,
    "sentence-transformers": measure_sentence_transformers,
}


def in_own_process(name, **settings):
    """What a measure returns in a fresh process."""
    words = [sys.executable, "-m", "training.benchmark", "measure", name, json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def report_memory(arguments):
    """Print the peaks of both batch sizes and their ratio."""
    peaks = {}
    for size in arguments.batch_sizes:
        found = in_own_process("memory", batch_size=size, micro_batch_size=arguments.micro_batch_size)
        peaks[size] = found["bytes"]
        print(f"batch {size:>5}, micro-batch {arguments.micro_batch_size}: {found['bytes'] / MIB:8.1f} MiB above")
    small, *_, large = arguments.batch_sizes
    print(f"ratio of {large} to {small}: {peaks[large] / peaks[small]:.2f}")


def report_speed(arguments):
    """Print both trainers' rates and peaks, and the ratio of paired runs."""
    names, found = ("gve", "sentence-transformers"), []
    settings = {
        "task": arguments.task,
        "batch_size": arguments.batch_size,
        "micro_batch_size": arguments.micro_batch_size,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "freeze_vision": arguments.freeze_vision,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder, arguments.task, arguments.batch_size * arguments.steps)
        for repeat in range(arguments.repeats):
            found.append({name: in_own_process(name, pairs=folder, seed=repeat, **settings) for name in names})
    print(f"{arguments.task}, batch {arguments.batch_size}, micro-batch {arguments.micro_batch_size}, ", end="")
    frozen = ", vision tower frozen" if arguments.freeze_vision else ""
    print(f"{arguments.steps} steps, median of {arguments.repeats}, {arguments.threads} threads{frozen}")
    for name in names:
        rate = median(each[name]["pairs_per_second"] for each in found)
        peak = median(each[name]["bytes"] for each in found)
        print(f"{name:<24}{rate:9.2f} pairs/s{peak / MIB:9.0f} MiB")
    print("where a pair's time goes in gve, ms: ", end="")
    parts = {part: median(each["gve"]["ms_a_pair"][part] for each in found) for part in found[0]["gve"]["ms_a_pair"]}
    print(", ".join(f"{part} {spent:.2f} ({spent / sum(parts.values()):.0%})" for part, spent in parts.items()))
    ratios = [each["gve"]["pairs_per_second"] / each[names[1]]["pairs_per_second"] for each in found]
    print(f"ratio of paired runs: median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


def main(words=None):
    parser = argparse.ArgumentParser(prog="training.benchmark", description="Speed and memory of a training step.")
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="peak of gradient caching by batch size")
    memory.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 1024])
    memory.add_argument("--micro_batch_size", type=int, default=32)
    speed = commands.add_parser("speed", help="beside sentence-transformers' trainer")
    speed.add_argument("--task", choices=["t2t", "t2i", "t2v"], default="t2i")
    speed.add_argument("--batch_size", type=int, default=128)
    speed.add_argument("--micro_batch_size", type=int, default=32)
    speed.add_argument("--steps", type=int, default=11)
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--threads", type=int, default=available_cores())
    speed.add_argument("--freeze_vision", action="store_true", help="as the paper trains; ours then remembers it")
    measure = commands.add_parser("measure", help="one measurement, for the other commands")
    measure.add_argument("name", choices=list(MEASURES))
    measure.add_argument("settings", type=json.loads)
    arguments = parser.parse_args(words)
    if arguments.command == "measure":
        print(json.dumps(MEASURES[arguments.name](**arguments.settings)))
    elif arguments.command == "memory":
        report_memory(arguments)
    else:
        report_speed(arguments)


if __name__ == "__main__":
    run_command("training.benchmark", main)
