"""What a training run is made of, and everything that can be wrong with it before the first step."""

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from huggingface_hub import HfApi
from transformers.integrations import unset_hf_deepspeed_config

from hub_cards.publish import check_access
from modeling_gve.vision_memory import VisionMemory
from training.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    computed_settings,
    parse_arguments,
    rank_zero,
)
from training.checkpoint import check_settings, checkpoints, forget_run, lock_run
from training.collate import PairCollator
from training.malloc import keep_freed_memory
from training.mine import check_reads, check_top_k, read_corpus
from training.pairs import FrameStore, PairStream, available_cores, read_pairs, remove_unfinished, task_names
from training.passes import SHARDED
from training.plan import print_plan
from training.probers import load_prober
from training.streaming import StreamedPairs
from training.weights import load_model, make_trainable, weights_digest


# Not in the paper: how long ranks wait while one decodes, merges or pushes. The ten minutes of NCCL could end a run
# before its first step.
PATIENCE = timedelta(hours=6)


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
        vision_memory ([`VisionMemory`], *optional*): of the frozen vision tower.
        lock (file, *optional*): of the main process on the run's folder, see [`lock_run`].
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
    vision_memory: Any = None
    lock: Any = None

    @property
    def sharded(self):
        """Whether ranks must make their passes together."""
        return self.accelerator.distributed_type in SHARDED


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
    if starts_from.quantization is not None and in_shards(accelerator):
        raise ValueError("quantization needs whole weights on every GPU: use DDP or ZeRO-2, not FSDP or ZeRO-3")
    set_seed(training.seed)
    if accelerator.device.type == "cpu":
        fix_cpu_arithmetic(training.cpu_threads or max(1, available_cores() // accelerator.num_processes))
        keep_freed_memory()
    lock = None
    if accelerator.is_main_process:
        lock = lock_run(training.run_dir)
        if training.overwrite:
            forget_run(training.run_dir)
        remove_unfinished(training.run_dir)
    accelerator.wait_for_everyone()

    model, processor = load_model(starts_from)
    # Under ZeRO-3 transformers loads models in shards over all ranks: this one, but no prober, nor later LoRA's base.
    unset_hf_deepspeed_config()
    starting_weights = weights_digest(model)
    longest = max(training.matryoshka_dims, default=0)
    if longest >= model.config.embedding_dim:
        raise ValueError(f"matryoshka_dims must be below the embedding's {model.config.embedding_dim}, got {longest}")
    visual = model.backbone.visual
    model = make_trainable(model, starts_from)
    vision_memory = None
    if starts_from.remember_vision:
        if accelerator.device.type != "cpu" or accelerator.distributed_type in SHARDED:
            raise ValueError("remember_vision is for CPUs with whole weights: leave it out")
        vision_memory = VisionMemory(visual, Path(training.run_dir) / "cache")
    prober, corpus = None, None
    if starts_from.prober and not checkpoints(training.run_dir):
        prober = load_prober(starts_from.prober, accelerator.device)
    with accelerator.main_process_first():
        store = FrameStore(Path(training.run_dir) / "cache", processor)
        streams, skipped = load_streams(accelerator, data, training, store, processor)
        if training.negative_corpus is not None:
            check_top_k(streams, training.mine_top_k)
            corpus = read_corpus(training.negative_corpus, data.split, store, progress=accelerator.is_main_process)
            if prober is not None:
                check_reads(starts_from.prober, prober, streams, corpus)
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
        vision_memory=vision_memory,
        lock=lock,
    )


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


def start_accelerator(training):
    """The ranks and trackers.

    Raises:
        ValueError: a tracker is not installed, FSDP is not version 2, or it would rename layers.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [name for name in training.report_to if name not in available]
    if missing:
        raise ValueError(f"report_to names {', '.join(missing)}, which is not installed: pip install {missing[0]}")
    # A text step does not touch the vision tower: its parameters are unused then.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    group = {"timeout": PATIENCE}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        # Accelerate knows no backend for DeepSpeed on CPUs, and would see one rank.
        group["backend"] = "gloo"
    handlers.append(InitProcessGroupKwargs(**group))
    accelerator = Accelerator(
        kwargs_handlers=handlers,
        log_with=training.report_to or None,
        project_dir=training.run_dir,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Batches are made here, task by task, so DeepSpeed cannot read their size off a loader.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": training.max_grad_norm}
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # else a run fails at its end
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version must be 2, as in accelerate/fsdp2.yaml, got {plugin.fsdp_version}")
        if plugin.activation_checkpointing:  # it renames layers: an adapter would be saved without weights
            raise ValueError("fsdp_activation_checkpointing is not for this: set gradient_checkpointing of the recipe")
        if accelerator.mixed_precision != "no":
            # Its policy would round the clock of videos, embeddings and sums of gradients to bfloat16.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32
            )
    return accelerator


def in_shards(accelerator):
    """Whether ranks hold parts of the weights, and not of gradients or optimizer states only."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.distributed_type == DistributedType.FSDP or (
        deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3
    )


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
