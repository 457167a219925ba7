"""What an epoch starts with: tasks are probed, their probabilities fixed, and negatives mined if asked."""

import hashlib
import json
from functools import partial

import numpy as np
from accelerate.utils import gather_object

from training.curriculum import Curriculum, probe_difficulty
from training.embedding import embed_sides, inner
from training.mine import MiningRules, give_mined, mine_streams
from training.weights import weights_digest


PROBE_BATCH = 128


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
    plan = curriculum.start_epoch(epoch, *probe(run, encoder, prober))
    if run.corpus is not None and (epoch == 0 or run.training.mine_every_epoch):
        model = inner(run, encoder)
        model.eval()
        digest = run.settings["starting_weights"] if prober is None else weights_digest(prober.model)
        if epoch > 0:  # trained weights are a function of the settings
            digest = json.dumps([run.settings, epoch])
        seen = [digest, run.corpus.store.folder.name, run.processor.max_length, run.processor.instruction]
        digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]
        embed = partial(embed_sides, run, model, prober=prober)
        mine_streams(run.streams, run.corpus, embed, digest, mining_rules(run.training), run.accelerator, run.sharded)
        model.train()
    run.prober = None  # another model's weights, for which there is no use any more
    return plan


def mining_rules(training):
    """The settings of hard-negative mining."""
    return MiningRules(
        training.mine_top_k, training.mine_margin, training.mine_relative_margin, training.mask_identical
    )


def probe(run, encoder, prober=None):
    """R_k and D_k of every task from N_p of its positive pairs, the same pairs at every call.

    R_k is their mean cosine; D_k says how well they are told from each other, see [`probe_difficulty`].

    # Not in the paper: a task that the prober cannot read (video, for one of texts) gets the mean of the others.

    Args:
        run ([`Run`]): tasks, settings, ranks.
        encoder ([`Encoder`]): the current weights, used where `prober` is None.
        prober (*optional*): an embedder as in [`Run`].

    Returns:
        `tuple` of two `dict[str, float]`, relevance and difficulty: the same on every rank.

    Raises:
        ValueError: the prober reads no task at all.
    """
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    encoder = inner(run, encoder)
    encoder.eval()  # DeepSpeed's returns nothing
    relevance, difficulty = {}, {}
    for task, stream in run.streams.items():
        pairs, store = stream.probe_pairs(run.training.probe_pairs, run.training.seed)
        if prober is not None:
            pairs = [pair for pair in pairs if prober.reads(pair.query) and prober.reads(pair.target)]
        mine = pairs[rank::ranks]
        count = len(mine)
        if run.sharded:  # as many on every rank; what fills up is not counted
            mine = mine + pairs[:1] * (-(-len(pairs) // ranks) - count)
        parts = []
        for start in range(0, len(mine), PROBE_BATCH):
            part = mine[start : start + PROBE_BATCH]
            sides = [(pair.query, pair.instruction) for pair in part] + [(pair.target, None) for pair in part]
            parts.append(np.stack(embed_sides(run, encoder, sides, store, prober).double().chunk(2)))
        everywhere = gather_object([np.concatenate(parts, axis=1)[:, :count] if parts else None])
        if not pairs:
            continue
        rows = np.empty((2, len(pairs), everywhere[0].shape[-1]))
        for first, part in enumerate(everywhere[: len(pairs)]):
            rows[:, first::ranks] = part
        queries, targets = rows
        relevance[task] = float((queries * targets).sum(axis=1).mean())
        difficulty[task] = probe_difficulty(queries @ targets.T, same_content(pairs), run.training.temperature)
    if not relevance:
        raise ValueError(f"prober {run.starts_from.prober!r} reads no task; it needs their modalities")
    encoder.train()
    return tuple(
        {task: scores.get(task, float(np.mean(list(scores.values())))) for task in run.streams}
        for scores in (relevance, difficulty)
    )


def same_content(pairs):
    """Which of n pairs share query, target or source: `(n, n)`, bool."""
    columns = [[pair.query for pair in pairs], [pair.target for pair in pairs], [pair.source_id for pair in pairs]]
    codes = [[column.index(value) for value in column] for column in columns]
    if None in columns[2]:  # nothing is known of it
        codes[2] = [-1 - row if value is None else code for row, (value, code) in enumerate(zip(columns[2], codes[2]))]
    return np.any([np.equal.outer(code, code) for code in map(np.array, codes)], axis=0)


def mined_places(run):
    """Mined negatives of each task as places in the corpus, for a checkpoint; of streamed tasks the name on disk."""
    if run.corpus is None:
        return {}
    if run.data.streaming:
        return {task: stream.mined.name for task, stream in run.streams.items() if stream.hard_negatives}
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
