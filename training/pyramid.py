"""Trains a General Video Embedder with the Modality Pyramid curriculum (arXiv 2510.27571).

```bash
# The demo's model, from gve-mini-base
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml

# Any setting of the recipe changed on the command line; --help lists them
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml --schedule uniform \
    --task_batch_size t2v=96 v2v=32 --output_dir build/hub/org/gve-mini-uniform

# Two processes on a CPU (plain --cpu --num_processes 2 would start only one)
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/pyramid.py --config ...

# Pushed when it has ended
accelerate launch training/pyramid.py --config training/recipes/gve_mini.yaml --push_to_hub --hub_model_id me/gve-mini
```

Each epoch starts with a probe of every task; each step, all ranks draw the same task, embed a batch of its pairs with
hard negatives, and take one step on the symmetric InfoNCE of the joined batch. A run that was killed goes on from its
newest checkpoint when the same command is given again, to the same weights as if it had never stopped.
"""

import hashlib
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import AutoModel, PretrainedConfig, get_scheduler

from hub_cards.publish import check_access
from modeling_gve import GVEModel, GVEProcessor
from training.arguments import (
    DataArguments,
    TrainingArguments,
    computed_settings,
    parse_arguments,
    rank_zero,
)
from training.checkpoint import check_settings, checkpoints, forget_run, load_checkpoint, save_checkpoint
from training.collate import PairCollator
from training.curriculum import Curriculum, probe_sample
from training.losses import gather_with_grad, symmetric_info_nce
from training.pairs import FrameStore, PairStream, available_cores, read_pairs, remove_unfinished, task_names
from training.record import StepLog, format_shares, push, report_skipped, save_repo, training_record


PROBE_BATCH = 128


@dataclass
class Run:
    """The parts of a training run.

    Attributes:
        accelerator (`Accelerator`): devices and ranks.
        model (`GVEModel`), processor (`GVEProcessor`): what is trained, and its inputs.
        prober (`PreTrainedModel`, *optional*): scores the tasks before the first epoch; None: the model itself.
        collator ([`PairCollator`]): from pairs to inputs.
        streams (`dict[str, PairStream]`): batches of each task.
        skipped (list of [`Skipped`]): pairs and negatives that could not be read.
        data ([`DataArguments`]), training ([`TrainingArguments`]): settings.
        settings (`dict`): all that decides the weights; a checkpoint must agree with it.
    """

    accelerator: Accelerator
    model: Any
    processor: Any
    prober: Any
    collator: PairCollator
    streams: dict
    skipped: list
    data: DataArguments
    training: TrainingArguments
    settings: dict


class Encoder(torch.nn.Module):
    """A model that embeds several padded batches in one call, as data-parallel wrappers need it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, groups):
        """Embeddings of all groups, concatenated: `(M, D)`."""
        return torch.cat([self.model(**group).embeddings for group in groups])


def load_model(arguments):
    """The starting weights, in float32, and their processor.

    Raises:
        ValueError: the name leads to no model that GVE can start from.
    """
    try:
        config = PretrainedConfig.get_config_dict(arguments.model)[0]
        if config.get("model_type") == "gve":
            model = GVEModel.from_pretrained(arguments.model, dtype=torch.float32)
        else:
            model = GVEModel.from_pretrained(arguments.model, dtype=torch.float32, **arguments.input_limits())
        return model, GVEProcessor.for_model(arguments.model, model.config)
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot start from model {arguments.model!r}: {' '.join(str(error).split())}") from error


def load_prober(name, device):
    """An embedder for the first epoch's probe: a repo whose model has `encode(items)`; code that it brings is run."""
    try:
        prober = AutoModel.from_pretrained(name, trust_remote_code=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load prober {name!r}: {' '.join(str(error).split())}") from error
    if not hasattr(prober, "encode"):
        raise ValueError(f"prober {name!r} has no encode(items): give a GVE repo or a model with that method")
    return prober


def load_streams(accelerator, data, training, store):
    """A [`PairStream`] for each task, and what had to be skipped. Media are decoded by the main process only."""
    known = task_names(data.pairs)
    unknown = [task for task in data.tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks names {', '.join(unknown)}, but {data.pairs} has {', '.join(sorted(known))}")
    streams, skipped = {}, []
    for task in data.tasks:
        pairs, broken = read_pairs(
            data.pairs, task, data.split, store, data.max_pairs, progress=accelerator.is_main_process
        )
        skipped += broken
        streams[task] = PairStream(
            task,
            pairs,
            data.batch_size_of(task),
            data.hard_negatives_of(task),
            training.seed,
            data.distinct_in_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        streams[task].batch(0)  # raises now rather than in the middle of the run
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
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.adam_beta2), fused=True)


def embed(run, encoder, items):
    """Embeddings of prepared items in their order, `(len(items), D)`."""
    groups, places = run.collator.forward_groups(items)
    device = run.accelerator.device
    return encoder([dict(group.to(device)) for group in groups])[places.to(device)]


@torch.no_grad()
def probe(run, encoder, prober=None):
    """R_k of every task: the mean cosine of N_p of its positive pairs, the same pairs at every call.

    Args:
        run ([`Run`]): tasks, settings, ranks.
        encoder ([`Encoder`]): the current weights, used where `prober` is None.
        prober (`PreTrainedModel`, *optional*): an embedder with `encode(items)`.

    Returns:
        `dict[str, float]`: the same on every rank.
    """
    accelerator = run.accelerator
    encoder = accelerator.unwrap_model(encoder).eval()  # unwrapped: ranks may need unlike numbers of passes
    relevance = {}
    for task, stream in run.streams.items():
        rows = probe_sample(task, len(stream.pairs), run.training.probe_pairs, run.training.seed)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(mine), PROBE_BATCH):
            pairs = [stream.pairs[row] for row in mine[start : start + PROBE_BATCH]]
            sides = [(pair.query, pair.instruction) for pair in pairs] + [(pair.target, None) for pair in pairs]
            if prober is None:
                embeddings = embed(run, encoder, [run.collator.prepare(*side) for side in sides])
            else:
                embeddings = prober.encode([run.collator.item(*side) for side in sides])
                embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
            queries, targets = embeddings.cpu().double().chunk(2)
            total += torch.tensor([(queries * targets).sum().item(), len(pairs)])
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
        relevance[task] = (total[0] / total[1]).item()
    encoder.train()
    return relevance


def training_step(run, encoder, stream, index):
    """Loss of batch `index` of a task, backpropagated; returns what is logged."""
    accelerator, training = run.accelerator, run.training
    pairs, number_of_pass = stream.batch(index)
    negatives = [stream.negatives_of(pair, number_of_pass) for pair in pairs]
    batch = run.collator.batch(pairs, negatives, stream.hard_negatives)
    embeddings = embed(run, encoder, batch.items)
    output = symmetric_info_nce(
        embeddings[batch.queries],
        embeddings[batch.targets],
        embeddings[batch.negatives],
        batch.negatives_valid.to(accelerator.device),
        temperature=training.temperature,
        identical_tolerance=training.mask_identical,
        margin=training.mask_margin,
        gather=gather_with_grad if training.cross_device_negatives else lambda rows: rows,
    )
    accelerator.backward(output.loss)
    loss, positive, relevance, masked = accelerator.reduce(
        torch.stack([output.loss, output.positive_score, output.relevance, output.masked]).detach(), reduction="mean"
    ).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"the loss of task {stream.task} is {loss}: lower learning_rate or raise temperature")
    gap = accelerator.gather(output.negative_gap.reshape(1)).max().item()
    gap = gap if math.isfinite(gap) else None  # masking left no negative
    return {"loss": loss, "positive": positive, "relevance": relevance, "gap": gap, "masked": masked}


def train(run):
    """The training loop.

    Args:
        run ([`Run`]): its model is trained in place.

    Returns:
        `dict`: `step`, `seconds`, `history` of the curriculum, `batches` by task.
    """
    accelerator, training, streams = run.accelerator, run.training, run.streams
    steps = training.epochs * training.steps_per_epoch
    curriculum = Curriculum(
        list(streams),
        training.epochs,
        training.steps_per_epoch,
        training.schedule,
        training.sigma_min,
        training.sigma_max,
        training.seed,
    )
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

    consumed, step, seconds = Counter(), 0, 0.0
    for newest in checkpoints(training.run_dir)[-1:]:
        accelerator.print(f"resuming from {newest}")
        progress = load_checkpoint(accelerator, newest)
        step, seconds, consumed = progress["step"], progress["seconds"], Counter(progress["consumed"])
        curriculum.load_state_dict(progress["curriculum"])
    log = StepLog(training.run_dir, step, len(curriculum.history), accelerator.is_main_process)
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not accelerator.is_main_process)
    started = time.monotonic() - seconds

    encoder.train()
    for epoch in range(step // training.steps_per_epoch, training.epochs):
        if epoch == len(curriculum.history):
            plan = curriculum.start_epoch(epoch, probe(run, encoder, run.prober if epoch == 0 else None))
            log.write({"step": step, **asdict(plan)})
            if accelerator.is_main_process:
                shares = format_shares(plan.probabilities)
                bar.write(f"epoch {epoch + 1} of {training.epochs}: sigma {plan.sigma:.2f}, P {shares}")
        for task in curriculum.draws(epoch)[step % training.steps_per_epoch :]:
            metrics = training_step(run, encoder, streams[task], consumed[task])
            metrics["grad_norm"] = accelerator.clip_grad_norm_(encoder.parameters(), training.max_grad_norm).item()
            metrics["learning_rate"] = scheduler.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            consumed[task] += 1
            step += 1
            seconds = time.monotonic() - started
            log.write({"step": step, "epoch": epoch, "task": task, **metrics, "seconds": round(seconds, 3)})
            show(bar, task, metrics)
            if step % training.save_steps == 0 or step % training.steps_per_epoch == 0:
                progress = {"step": step, "seconds": seconds, "consumed": consumed, "settings": run.settings}
                progress["curriculum"] = curriculum.state_dict()
                save_checkpoint(accelerator, training.run_dir, progress, training.save_total_limit)
    bar.close()
    history = curriculum.state_dict()["history"]
    return {"step": step, "seconds": seconds, "history": history, "batches": dict(consumed)}


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
    model_arguments, data, training = parse_arguments(words)
    if training.push_to_hub and rank_zero():
        check_access(HfApi(), training.hub_model_id.rpartition("/")[0])
    # A text step does not touch the vision tower: its parameters are unused then.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(training.seed)
    if accelerator.device.type == "cpu":
        fix_cpu_arithmetic(training.cpu_threads or max(1, available_cores() // accelerator.num_processes))
    if accelerator.is_main_process:
        if training.overwrite:
            forget_run(training.run_dir)
        remove_unfinished(training.run_dir)
    accelerator.wait_for_everyone()

    model, processor = load_model(model_arguments)
    model.backbone.visual.requires_grad_(not training.freeze_vision)
    resumes = bool(checkpoints(training.run_dir))
    prober = None
    if model_arguments.prober and not resumes:
        prober = load_prober(model_arguments.prober, accelerator.device)
    with accelerator.main_process_first():
        store = FrameStore(Path(training.run_dir) / "cache", processor)
        streams, skipped = load_streams(accelerator, data, training, store)
    if training.steps_per_epoch is None:
        training.steps_per_epoch = steps_of_a_pass(streams, accelerator.num_processes)
    settings = computed_settings(model_arguments, data, training) | {
        "world_size": accelerator.num_processes,
        "starting_weights": weights_digest(model),
        "pairs_content": pairs_digest(streams),
    }
    for path in checkpoints(training.run_dir)[-1:]:
        check_settings(path, settings)
    collator = PairCollator(processor, store)
    return Run(accelerator, model, processor, prober, collator, streams, skipped, data, training, settings)


def steps_of_a_pass(streams, world_size):
    """Steps that see about as many queries as there are pairs, whatever the tasks drawn."""
    queries_a_step = np.mean([stream.batch_size for stream in streams.values()]) * world_size
    return max(1, round(sum(len(stream.pairs) for stream in streams.values()) / queries_a_step))


def weights_digest(model):
    """Twelve digits that tell starting weights apart, from samples of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values[:: max(1, len(values) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def pairs_digest(streams):
    """Twelve digits that tell the content of all tasks' pairs apart."""
    digest = hashlib.sha256()
    for task, stream in streams.items():
        digest.update(task.encode())
        for pair in stream.pairs:
            digest.update(repr(tuple(pair)).encode())
    return digest.hexdigest()[:12]


def fix_cpu_arithmetic(threads):
    """Use so many threads, and sum in a fixed order, so that a resumed run equals an uninterrupted one bit by bit."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


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
    if run.accelerator.is_main_process:
        save_repo(run.model, run.processor, run.training.output_dir, training_record(run, outcome))
        print(f"trained {outcome['step']} steps in {outcome['seconds'] / 60:.1f} minutes: {run.training.output_dir}")
        if run.training.push_to_hub:
            print(f"pushed to {push(run.training.output_dir, run.training.hub_model_id)}")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
