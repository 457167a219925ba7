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

import math
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from tqdm import tqdm
from transformers import get_scheduler

from training.arguments import rank_zero
from training.checkpoint import checkpoints, load_checkpoint, save_checkpoint, save_trained_weights_only
from training.embedding import Encoder, to_device
from training.epoch import make_curriculum, mined_places, remember_mined, start_epoch
from training.gradcache import cached_step
from training.loader import load_batches
from training.losses import gather_with_grad, matryoshka_info_nce
from training.pairs import Skipped
from training.passes import align_passes
from training.prepare import prepare
from training.record import (
    StepLog,
    draw_curriculum,
    format_shares,
    push,
    report_skipped,
    save_repo,
    training_record,
)
from training.streaming import skipped_sides
from training.watch import Watch
from training.weights import export_model


def make_optimizer(model, training):
    """AdamW that decays matrices, not norms and biases, and leaves frozen parameters out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under ZeRO-3 parameters come in shards, which have no shape of their own.
    axes = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained]
    matrices = [parameter for parameter, number in zip(trained, axes) if number > 1]
    vectors = [parameter for parameter, number in zip(trained, axes) if number <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # LoRA has matrices only, and DeepSpeed takes no empty group
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.adam_beta2), fused=True)


def fill_state(optimizer):
    """AdamW's state before the first step, which it makes at a parameter's first gradient otherwise.

    FSDP2 loads no checkpoint without the state of some, say of the vision tower before its first picture.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {"step": torch.zeros((), device=parameter.device)}
            optimizer.state[parameter] = state | {
                name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
            }


def training_step(run, encoder, task, batch):
    """Loss of a loaded batch of a task, backpropagated; returns what is logged."""
    accelerator, training = run.accelerator, run.training
    device, groups, places = accelerator.device, batch.groups, batch.places
    if run.sharded:
        groups, places = align_passes(groups, places, accelerator, run.processor)
    places, contents = places.to(device), batch.contents.to(device)

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
            contents=tuple(contents[each] for each in (batch.queries, batch.targets, batch.negatives)),
        )

    if training.micro_batch_size is None:
        output = loss_of(encoder([to_device(group, device) for group in groups]))
        accelerator.backward(output.loss)
    else:
        embed = lambda group: encoder([to_device(group, device)])  # noqa: E731
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
    """Backward passes inside leave their gradients on this rank; DeepSpeed takes no step after them.

    FSDP joins them all the same: it would keep the whole model's gradients on every rank.
    """
    joins = run.accelerator.distributed_type == DistributedType.FSDP
    run.accelerator.gradient_state._set_sync_gradients(False)
    try:
        with nullcontext() if joins else run.accelerator.no_sync(encoder):
            yield
    finally:
        run.accelerator.gradient_state._set_sync_gradients(True)


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
    if accelerator.distributed_type == DistributedType.FSDP:
        fill_state(optimizer)
    if not run.sharded:
        save_trained_weights_only(accelerator)

    consumed, cursors, warnings, told, step, seconds = Counter(), {}, [], [], 0, 0.0
    for newest in checkpoints(training.run_dir)[-1:]:
        accelerator.print(f"resuming from {newest}")
        progress = load_checkpoint(accelerator, newest)
        step, seconds, consumed = progress["step"], progress["seconds"], Counter(progress["consumed"])
        cursors, warnings, told = progress["cursors"], progress["warnings"], progress.get("told", [])
        curriculum.load_state_dict(progress["curriculum"])
        remember_mined(run, progress["mined"])
    log = StepLog(training.run_dir, step, len(curriculum.history), accelerator.is_main_process)
    accelerator.init_trackers("gve", config={name: str(value) for name, value in run.settings.items()})
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not accelerator.is_main_process)
    started = time.monotonic() - seconds

    def warn(kind, sentence):
        warnings.append(sentence)
        log.write({"step": step, "epoch": epoch, "warning": kind, "message": sentence})
        if accelerator.is_main_process:
            bar.write(f"warning: {sentence}")

    watch = Watch(warn, told)
    encoder.train()
    for epoch in range(step // training.steps_per_epoch, training.epochs):
        if epoch == len(curriculum.history):
            plan = start_epoch(run, encoder, curriculum, epoch)
            log.write({"step": step, **asdict(plan)})
            accelerator.log(tracked_plan(plan), step=step)
            if accelerator.is_main_process:
                shares = format_shares(plan.probabilities)
                bar.write(f"epoch {epoch + 1} of {training.epochs}: sigma {plan.sigma:.2f}, P {shares}")
            watch.epoch(plan, curriculum.draws(epoch))
        for task, cursor in cursors.items():
            streams[task].seek(cursor)  # workers drew what came before: here the stream stands where it started
        tasks = curriculum.draws(epoch)[step % training.steps_per_epoch :]
        for task, (batch, waited) in zip(tasks, planned_batches(run, tasks, consumed)):
            metrics = training_step(run, encoder, task, batch)
            norm = accelerator.clip_grad_norm_(encoder.parameters(), training.max_grad_norm)
            metrics["grad_norm"] = norm = None if norm is None else float(norm)
            if norm is not None and not math.isfinite(norm) and accelerator.scaler is None:  # fp16's skips such steps
                raise ValueError(f"the gradient of task {task} is {norm}: lower learning_rate or raise temperature")
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
                progress |= {"mined": mined_places(run), "told": sorted(watch.told)}
                save_checkpoint(accelerator, training.run_dir, progress, training.save_total_limit)
                if run.vision_memory is not None:
                    run.vision_memory.save()
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


def tracked(metrics):
    """Metrics of a step for a tracker, which takes numbers only."""
    return {name: value for name, value in metrics.items() if value is not None}


def tracked_plan(plan):
    """R_k, D_k, P(k) and sigma of an epoch for a tracker."""
    values = {f"R/{task}": score for task, score in plan.relevance.items()}
    values |= {f"D/{task}": score for task, score in plan.difficulty.items()}
    return values | {f"P/{task}": share for task, share in plan.probabilities.items()} | {"sigma": plan.sigma}


def show(bar, task, metrics):
    """Advance the progress bar by a step."""
    gap = "none" if metrics["gap"] is None else f"{metrics['gap']:+.2f}"
    loss, positive = f"{metrics['loss']:.3f}", f"{metrics['positive']:.2f}"
    bar.set_postfix(task=task, loss=loss, positive=positive, gap=gap, refresh=False)
    bar.update()


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
    model.config.matryoshka_dims = sorted(set(run.training.matryoshka_dims), reverse=True)
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
