"""Trains a General Video Embedder with the Modality Pyramid curriculum (arXiv 2510.27571).

```bash
# The demo's model, from gve-mini-base
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml

# Any setting of the recipe changed on the command line; --help lists them
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml --schedule uniform \
    --task_batch_size t2v=96 v2v=32 --output_dir build/hub/org/gve-mini-uniform

# Two processes on a CPU (plain --cpu --num_processes 2 would start only one)
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/pyramid.py --config ...

# What a recipe will need: steps, memory, hours, disk; no GPU and no weights
accelerate launch training/pyramid.py --config training/recipes/gve_7b.yaml --plan

# Pushed when it has ended
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml --push_to_hub --hub_model_id me/gve-mini
```

Each epoch starts with a probe of every task; each step, all ranks draw the same task, embed a batch of its pairs with
hard negatives, and take one step on the symmetric InfoNCE of the joined batch. A run that was killed goes on from its
newest checkpoint when the same command is given again, to the same weights as if it had never stopped.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import get_scheduler

from hub_cards.publish import check_access
from training.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    computed_settings,
    parse_arguments,
    rank_zero,
)
from training.checkpoint import (
    check_settings,
    checkpoints,
    forget_run,
    load_checkpoint,
    save_checkpoint,
    save_trained_weights_only,
)
from training.collate import PairCollator
from training.curriculum import Curriculum
from training.gradcache import cached_step
from training.loader import load_batches
from training.losses import gather_with_grad, matryoshka_info_nce
from training.mine import MiningRules, give_mined, mine_streams, read_corpus
from training.pairs import FrameStore, PairStream, Skipped, available_cores, read_pairs, remove_unfinished, task_names
from training.passes import SHARDED, align_passes
from training.plan import print_plan
from training.probers import load_prober
from training.record import (
    StepLog,
    draw_curriculum,
    format_shares,
    push,
    report_skipped,
    save_repo,
    training_record,
)
from training.streaming import StreamedPairs, skipped_sides
from training.watch import Watch
from training.weights import export_model, load_model, make_trainable, weights_digest


PROBE_BATCH = 128


@dataclass
class Run:
    """The parts of a training run.

    Attributes:
        accelerator (`Accelerator`): devices and ranks.
        model (`torch.nn.Module`), processor (`GVEProcessor`): what is trained, and its inputs.
        prober ([`ModelProber`] or [`SentenceTransformerProber`], *optional*): scores the tasks before the first epoch;
            None: the model itself.
        collator ([`PairCollator`]): from pairs to inputs.
        streams (`dict[str, PairStream]`): batches of each task.
        corpus ([`Corpus`], *optional*): what hard negatives are mined from.
        skipped (list of [`Skipped`]): pairs and negatives that could not be read.
        starts_from ([`ModelArguments`]), data ([`DataArguments`]), training ([`TrainingArguments`]): settings.
        settings (`dict`): all that decides the weights; a checkpoint must agree with it.
    """

    accelerator: Accelerator
    model: Any
    processor: Any
    prober: Any
    collator: PairCollator
    streams: dict
    corpus: Any
    skipped: list
    starts_from: ModelArguments
    data: DataArguments
    training: TrainingArguments
    settings: dict

    @property
    def sharded(self):
        """Whether ranks must make their passes together."""
        return self.accelerator.distributed_type in SHARDED


class Encoder(torch.nn.Module):
    """A model that embeds several padded batches in one call, as data-parallel wrappers need it.

    FSDP makes a unit of each of its decoder layers, of whichever backbone; see `accelerate/fsdp2.yaml`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = [type(model.backbone.language_model.layers[0]).__name__]  # accelerate reads it

    def forward(self, groups):
        """Embeddings of all groups, concatenated: `(M, D)`."""
        return torch.cat([self.model(**group).embeddings for group in groups])


def load_streams(accelerator, data, training, store, processor):
    """A stream of batches for each task, and what had to be skipped. Media are decoded by the main process only."""
    known = task_names(data.pairs)
    unknown = [task for task in data.tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks names {', '.join(unknown)}, but {data.pairs} has {', '.join(sorted(known))}")
    streams, skipped = {}, []
    for task in data.tasks:
        shape = {
            "batch_size": data.batch_size_of(task),
            "hard_negatives": data.hard_negatives_of(task),
            "seed": training.seed,
            "distinct": data.distinct_in_batch,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
        }
        if data.streaming:
            streams[task] = StreamedPairs(
                data.pairs,
                task,
                data.split,
                root=Path(training.run_dir) / "cache/windows",
                processor=processor,
                window_pairs=data.window_pairs,
                max_pairs=data.max_pairs_of(task),
                **shape,
            )
        else:
            pairs, broken = read_pairs(
                data.pairs, task, data.split, store, data.max_pairs_of(task), progress=accelerator.is_main_process
            )
            skipped += broken
            streams[task] = PairStream(task, pairs, store=store, **shape)
        streams[task].draw(0) if data.streaming else streams[task].batch(0)  # raises now, not in the middle of the run
    store.seal()
    return streams, skipped


def make_optimizer(model, training):
    """AdamW that decays matrices, not norms and biases, and leaves frozen parameters out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # LoRA has matrices only, and DeepSpeed takes no empty group
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.adam_beta2), fused=True)


def embed_items(run, encoder, items):
    """Embeddings of prepared items in their order, `(len(items), D)`."""
    groups, places = run.collator.forward_groups(items, run.training.micro_batch_size)
    groups = [dict(group) for group in groups]
    if run.sharded:
        groups, places = align_passes(groups, places, run.accelerator, run.processor)
    device = run.accelerator.device
    return encoder([_to(group, device) for group in groups])[places.to(device)]


def _to(group, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in group.items()}


@torch.no_grad()
def embed_sides(run, encoder, sides, store, prober=None):
    """Embeddings of sides by the prober, or by the current weights without one.

    Args:
        run ([`Run`]): see there.
        encoder ([`Encoder`]): unwrapped and in evaluation mode.
        sides (list of `([`Side`], str or None)`): content and instruction. Where weights are sharded every rank must
            call with as many.
        store ([`FrameStore`]): of their media.
        prober (*optional*): as in [`Run`].

    Returns:
        `torch.Tensor` of shape `(len(sides), D)`, on the CPU.
    """
    if prober is None:
        return embed_items(run, encoder, [run.collator.prepare(*side, store=store) for side in sides]).cpu()
    return prober.encode([run.collator.item(*side, store=store) for side in sides])


def probe(run, encoder, prober=None):
    """R_k of every task: the mean cosine of N_p of its positive pairs, the same pairs at every call.

    # Not in the paper: a task that the prober cannot read (video, for one of texts) gets the mean of the others.

    Args:
        run ([`Run`]): tasks, settings, ranks.
        encoder ([`Encoder`]): the current weights, used where `prober` is None.
        prober (*optional*): an embedder as in [`Run`].

    Returns:
        `dict[str, float]`: the same on every rank.

    Raises:
        ValueError: the prober reads no task at all.
    """
    accelerator = run.accelerator
    encoder = inner(run, encoder)
    encoder.eval()  # DeepSpeed's returns nothing
    relevance = {}
    for task, stream in run.streams.items():
        pairs, store = stream.probe_pairs(run.training.probe_pairs, run.training.seed)
        if prober is not None:
            pairs = [pair for pair in pairs if prober.reads(pair.query) and prober.reads(pair.target)]
        mine = pairs[accelerator.process_index :: accelerator.num_processes]
        count = len(mine)
        if run.sharded:  # as many on every rank; what fills up is not counted
            mine = mine + pairs[:1] * (-(-len(pairs) // accelerator.num_processes) - count)
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(mine), PROBE_BATCH):
            part = mine[start : start + PROBE_BATCH]
            sides = [(pair.query, pair.instruction) for pair in part] + [(pair.target, None) for pair in part]
            queries, targets = embed_sides(run, encoder, sides, store, prober).double().chunk(2)
            counted = (queries * targets)[: max(count - start, 0)]
            total += torch.tensor([counted.sum().item(), len(counted)])
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
        relevance[task] = (total[0] / total[1]).item() if total[1] else None
    known = [score for score in relevance.values() if score is not None]
    if not known:
        raise ValueError(f"prober {run.starts_from.prober!r} reads no task; it needs their modalities")
    encoder.train()
    return {task: float(np.mean(known)) if score is None else score for task, score in relevance.items()}


def inner(run, encoder):
    """The encoder without the wrapper that joins ranks, which may need unlike numbers of passes here."""
    return encoder if run.sharded else run.accelerator.unwrap_model(encoder)


def training_step(run, encoder, task, batch):
    """Loss of a loaded batch of a task, backpropagated; returns what is logged."""
    accelerator, training = run.accelerator, run.training
    device, groups, places = accelerator.device, batch.groups, batch.places
    if run.sharded:
        groups, places = align_passes(groups, places, accelerator, run.processor)
    places = places.to(device)

    def loss_of(rows):
        rows = rows[places]
        return matryoshka_info_nce(
            rows[batch.queries],
            rows[batch.targets],
            rows[batch.negatives],
            batch.negatives_valid.to(device),
            dims=training.matryoshka_dims,
            temperature=training.temperature,
            identical_tolerance=training.mask_identical,
            margin=training.mask_margin,
            gather=gather_with_grad if training.cross_device_negatives else lambda rows: rows,
            symmetric=training.symmetric,
        )

    if training.micro_batch_size is None:
        output = loss_of(encoder([_to(group, device) for group in groups]))
        accelerator.backward(output.loss)
    else:
        embed = lambda group: encoder([_to(group, device)])  # noqa: E731
        output = cached_step(embed, groups, loss_of, accelerator.backward, device, partial(_no_sync, run, encoder))
    loss, positive, relevance, masked = accelerator.reduce(
        torch.stack([output.loss, output.positive_score, output.relevance, output.masked]).detach(), reduction="mean"
    ).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"the loss of task {task} is {loss}: lower learning_rate or raise temperature")
    gap = accelerator.gather(output.negative_gap.reshape(1)).max().item()
    gap = gap if math.isfinite(gap) else None  # masking left no negative
    return {"loss": loss, "positive": positive, "relevance": relevance, "gap": gap, "masked": masked}


@contextmanager
def _no_sync(run, encoder):
    """Backward passes inside leave their gradients on this rank; DeepSpeed takes no step after them."""
    run.accelerator.gradient_state._set_sync_gradients(False)
    try:
        with run.accelerator.no_sync(encoder):
            yield
    finally:
        run.accelerator.gradient_state._set_sync_gradients(True)


def make_curriculum(run):
    """The run's [`Curriculum`], at its beginning."""
    training, streams = run.training, run.streams
    return Curriculum(
        list(streams),
        training.epochs,
        training.steps_per_epoch,
        training.schedule,
        training.sigma_min,
        training.sigma_max,
        training.seed,
        sizes={task: len(stream) for task, stream in streams.items()},
        sampling_alpha=training.sampling_alpha,
        upsampling=run.data.task_upsampling,
    )


def start_epoch(run, encoder, curriculum, epoch):
    """Probe the tasks, fix the epoch's probabilities and mine negatives if asked: [`EpochPlan`]."""
    prober = run.prober if epoch == 0 else None
    plan = curriculum.start_epoch(epoch, probe(run, encoder, prober))
    if run.corpus is not None and (epoch == 0 or run.training.mine_every_epoch):
        if prober is not None and not all(map(prober.reads, run.corpus.sides)):
            raise ValueError(f"prober {run.starts_from.prober!r} cannot read all of the corpus: choose one that can")
        model = inner(run, encoder)
        model.eval()
        digest = run.settings["starting_weights"] if prober is None else weights_digest(prober.model)
        if epoch > 0:  # trained weights are a function of the settings
            digest = hashlib.sha256(json.dumps([run.settings, epoch]).encode()).hexdigest()[:12]
        embed = partial(embed_sides, run, model, prober=prober)
        mine_streams(run.streams, run.corpus, embed, digest, mining_rules(run.training), run.accelerator, run.sharded)
        model.train()
    return plan


def mining_rules(training):
    """The settings of hard-negative mining."""
    return MiningRules(
        training.mine_top_k, training.mine_margin, training.mine_relative_margin, training.mask_identical
    )


def train(run):
    """The training loop.

    Args:
        run ([`Run`]): its model is trained in place.

    Returns:
        `dict`: `step`, `seconds`, `history` of the curriculum with its draws, `batches` by task, `warnings`, and
        `encoder`.
    """
    accelerator, training, streams = run.accelerator, run.training, run.streams
    steps = training.epochs * training.steps_per_epoch
    curriculum = make_curriculum(run)
    optimizer = make_optimizer(run.model, training)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        round(training.warmup_ratio * steps),
        steps,
        scheduler_specific_kwargs={"min_lr_rate": training.min_learning_rate_ratio},
    )
    encoder, optimizer = accelerator.prepare(Encoder(run.model), optimizer)
    accelerator.register_for_checkpointing(scheduler)
    if not run.sharded:
        save_trained_weights_only(accelerator)

    consumed, cursors, warnings, step, seconds = Counter(), {}, [], 0, 0.0
    for newest in checkpoints(training.run_dir)[-1:]:
        accelerator.print(f"resuming from {newest}")
        progress = load_checkpoint(accelerator, newest)
        step, seconds, consumed = progress["step"], progress["seconds"], Counter(progress["consumed"])
        cursors, warnings = progress["cursors"], progress["warnings"]
        curriculum.load_state_dict(progress["curriculum"])
        remember_mined(run, progress["mined"])
    for task, cursor in cursors.items():
        streams[task].seek(cursor)
    log = StepLog(training.run_dir, step, len(curriculum.history), accelerator.is_main_process)
    accelerator.init_trackers("gve", config={name: str(value) for name, value in run.settings.items()})
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not accelerator.is_main_process)
    started = time.monotonic() - seconds

    def warn(kind, sentence):
        warnings.append(sentence)
        log.write({"step": step, "epoch": epoch, "warning": kind, "message": sentence})
        if accelerator.is_main_process:
            bar.write(f"warning: {sentence}")

    watch = Watch(warn)
    encoder.train()
    for epoch in range(step // training.steps_per_epoch, training.epochs):
        if epoch == len(curriculum.history):
            plan = start_epoch(run, encoder, curriculum, epoch)
            log.write({"step": step, **asdict(plan)})
            accelerator.log(tracked_plan(plan), step=step)
            if accelerator.is_main_process:
                shares = format_shares(plan.probabilities)
                bar.write(f"epoch {epoch + 1} of {training.epochs}: sigma {plan.sigma:.2f}, P {shares}")
            watch.epoch(plan, training.steps_per_epoch)
        tasks = curriculum.draws(epoch)[step % training.steps_per_epoch :]
        for task, (batch, waited) in zip(tasks, planned_batches(run, tasks, consumed)):
            metrics = training_step(run, encoder, task, batch)
            norm = accelerator.clip_grad_norm_(encoder.parameters(), training.max_grad_norm)
            metrics["grad_norm"] = None if norm is None else float(norm)
            metrics["learning_rate"] = scheduler.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            consumed[task] += 1
            if batch.cursor is not None:
                cursors[task] = batch.cursor
            step += 1
            before, seconds = seconds, time.monotonic() - started
            log.write({"step": step, "epoch": epoch, "task": task, **metrics, "seconds": round(seconds, 3)})
            accelerator.log({f"{task}/loss": metrics["loss"], **tracked(metrics), "waited": waited}, step=step)
            show(bar, task, metrics)
            watch.step(metrics["relevance"], waited, seconds - before)
            if step % training.save_steps == 0 or step % training.steps_per_epoch == 0:
                progress = {"step": step, "seconds": seconds, "consumed": consumed, "settings": run.settings}
                progress |= {"cursors": cursors, "warnings": warnings, "curriculum": curriculum.state_dict()}
                progress["mined"] = mined_places(run)
                save_checkpoint(accelerator, training.run_dir, progress, training.save_total_limit)
    bar.close()
    return {
        "step": step,
        "seconds": seconds,
        "history": [asdict(plan) | {"draws": Counter(curriculum.draws(plan.epoch))} for plan in curriculum.history],
        "batches": dict(consumed),
        "warnings": warnings,
        "encoder": encoder,
    }


def planned_batches(run, tasks, consumed):
    """Loaded batches of the next steps, see [`load_batches`]."""
    counts, plan = Counter(consumed), []
    for task in tasks:
        plan.append((task, counts[task]))
        counts[task] += 1
    pin_memory = run.accelerator.device.type == "cuda"
    micro_batch_size, workers = run.training.micro_batch_size, run.data.loader_workers
    return load_batches(run.collator, run.streams, plan, micro_batch_size, workers, pin_memory)


def mined_places(run):
    """Mined negatives of each task as places in the corpus, for a checkpoint; of streamed tasks the name on disk."""
    if run.corpus is None:
        return {}
    if run.data.streaming:
        return {task: stream.mined.name for task, stream in run.streams.items()}
    places = {side: place for place, side in enumerate(run.corpus.sides)}
    return {
        task: {row: [places[side] for side in sides] for row, sides in stream.mined.items()}
        for task, stream in run.streams.items()
    }


def remember_mined(run, mined):
    """Give the streams what `mined_places` says."""
    for task, rows in mined.items():
        if run.data.streaming:
            give_mined(run.streams[task], run.corpus, rows)
        else:
            sides = {int(row): [run.corpus.sides[place] for place in rows[row]] for row in rows}
            run.streams[task].mined = sides


def tracked(metrics):
    """Metrics of a step for a tracker, which takes numbers only."""
    return {name: value for name, value in metrics.items() if value is not None}


def tracked_plan(plan):
    """R_k, P(k) and sigma of an epoch for a tracker."""
    values = {f"R/{task}": score for task, score in plan.relevance.items()}
    return values | {f"P/{task}": share for task, share in plan.probabilities.items()} | {"sigma": plan.sigma}


def show(bar, task, metrics):
    """Advance the progress bar by a step."""
    gap = "none" if metrics["gap"] is None else f"{metrics['gap']:+.2f}"
    loss, positive = f"{metrics['loss']:.3f}", f"{metrics['positive']:.2f}"
    bar.set_postfix(task=task, loss=loss, positive=positive, gap=gap, refresh=False)
    bar.update()


def prepare(words=None):
    """Everything that can be wrong with settings, data or model, before the first step.

    Args:
        words (`list[str]`, *optional*): the command line; default: `sys.argv[1:]`.

    Returns:
        [`Run`]

    Raises:
        ValueError: one line for the user.
    """
    starts_from, data, training = parse_arguments(words)
    if training.plan:
        if rank_zero():
            print_plan(starts_from, data, training)
        sys.exit(0)
    if training.push_to_hub and rank_zero():
        check_access(HfApi(), training.hub_model_id.rpartition("/")[0])
    accelerator = start_accelerator(training)
    set_seed(training.seed)
    if accelerator.device.type == "cpu":
        fix_cpu_arithmetic(training.cpu_threads or max(1, available_cores() // accelerator.num_processes))
    if accelerator.is_main_process:
        if training.overwrite:
            forget_run(training.run_dir)
        remove_unfinished(training.run_dir)
    accelerator.wait_for_everyone()

    model, processor = load_model(starts_from)
    starting_weights = weights_digest(model)
    longest = max(training.matryoshka_dims, default=0)
    if longest >= model.config.embedding_dim:
        raise ValueError(f"matryoshka_dims must be below the embedding's {model.config.embedding_dim}, got {longest}")
    model = make_trainable(model, starts_from)
    prober, corpus = None, None
    if starts_from.prober and not checkpoints(training.run_dir):
        prober = load_prober(starts_from.prober, accelerator.device)
    with accelerator.main_process_first():
        store = FrameStore(Path(training.run_dir) / "cache", processor)
        streams, skipped = load_streams(accelerator, data, training, store, processor)
        if training.negative_corpus is not None:
            corpus = read_corpus(training.negative_corpus, data.split, store, progress=accelerator.is_main_process)
    if training.steps_per_epoch is None:
        training.steps_per_epoch = steps_of_a_pass(streams, accelerator.num_processes, data.task_upsampling)
    settings = computed_settings(starts_from, data, training) | {
        "world_size": accelerator.num_processes,
        "starting_weights": starting_weights,
        "pairs_content": pairs_digest(streams),
    }
    if corpus is not None:
        settings["corpus_content"] = corpus.digest()
    for path in checkpoints(training.run_dir)[-1:]:
        check_settings(path, settings)
    return Run(
        accelerator=accelerator,
        model=model,
        processor=processor,
        prober=prober,
        collator=PairCollator(processor, store),
        streams=streams,
        corpus=corpus,
        skipped=skipped,
        starts_from=starts_from,
        data=data,
        training=training,
        settings=settings,
    )


def start_accelerator(training):
    """The ranks and trackers.

    Raises:
        ValueError: a tracker is not installed.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [name for name in training.report_to if name not in available]
    if missing:
        raise ValueError(f"report_to names {', '.join(missing)}, which is not installed: pip install {missing[0]}")
    # A text step does not touch the vision tower: its parameters are unused then.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        # Accelerate knows no backend for DeepSpeed on CPUs, and would see one rank.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        kwargs_handlers=handlers,
        log_with=training.report_to or None,
        project_dir=training.run_dir,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Batches are made here, task by task, so DeepSpeed cannot read their size off a loader.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": training.max_grad_norm}
    return accelerator


def steps_of_a_pass(streams, world_size, upsampling=None):
    """Steps that see about as many queries as there are pairs, up-sampled ones as often as asked."""
    factors = upsampling or {}
    queries_a_step = np.mean([stream.batch_size for stream in streams.values()]) * world_size
    pairs = sum(len(stream) * factors.get(task, 1) for task, stream in streams.items())
    return max(1, round(pairs / queries_a_step))


def pairs_digest(streams):
    """Twelve digits that tell the content of all tasks' pairs apart."""
    digest = hashlib.sha256()
    for task, stream in streams.items():
        digest.update(task.encode())
        digest.update(stream.digest())
    return digest.hexdigest()[:12]


def fix_cpu_arithmetic(threads):
    """Use so many threads, and sum in a fixed order, so that a resumed run equals an uninterrupted one bit by bit."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def finish(run, outcome, state):
    """Write the trained repo, and push it if asked; the main process calls this.

    Args:
        run ([`Run`]), outcome (`dict`): as trained.
        state (`dict`, *optional*): the encoder's state dict, gathered from shards.
    """
    output_dir = run.training.output_dir
    if state is not None:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if run.data.streaming:
        run.skipped += [Skipped(*each) for each in skipped_sides(Path(run.training.run_dir) / "cache/windows")]
        report_skipped(run)
    model, state = export_model(run.model, run.starts_from, output_dir, state, run.training.hub_model_id)
    save_repo(model, run.processor, output_dir, training_record(run, outcome), state)
    draw_curriculum(outcome["history"], Path(output_dir) / "curriculum.png")
    print(f"trained {outcome['step']} steps in {outcome['seconds'] / 60:.1f} minutes: {output_dir}")
    if run.training.push_to_hub:
        print(f"pushed to {push(output_dir, run.training.hub_model_id)}")


def main(words=None):
    try:
        run = prepare(words)
    except ValueError as error:
        if rank_zero():
            print(f"pyramid.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if run.accelerator.is_main_process:
        report_skipped(run)
    outcome = train(run)
    state = run.accelerator.get_state_dict(outcome.pop("encoder")) if run.sharded else None
    if run.accelerator.is_main_process:
        finish(run, outcome, state)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
