"""Several ranks against one that holds the joined batch: loss, gradients, probe, drawn tasks, mined negatives.

One launch a world size checks everything that needs real processes. Three ranks share out unevenly what two share
evenly: corpus rows, sides to embed, probed pairs.
"""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from training.curriculum import Curriculum
from training.epoch import probe
from training.gradcache import cached_step
from training.losses import gather_with_grad, matryoshka_info_nce
from training.mine import Corpus, EmbeddingCache, MiningRules, embed_all, mine
from training.pairs import Pair, PairStream, Side


pytest.importorskip("faiss")
# Also accelerate's ranks: `mine` and `probe` take one.
ONE_RANK = SimpleNamespace(
    process_index=0,
    num_processes=1,
    is_main_process=True,
    device=torch.device("cpu"),
    wait_for_everyone=lambda: None,
    unwrap_model=lambda model: model,
    reduce=lambda tensor, reduction: tensor,
)
LOSSES = {
    "plain": {"identical_tolerance": None, "margin": None},
    "masked": {"margin": 0.3},
    "matryoshka": {"dims": [3]},
    "one direction": {"symmetric": False},
}
CORPUS_SIZES = (301, 2)  # the second is smaller than three ranks


def random_rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def joined_batch():
    """Queries, targets, two negatives of each and which of them exist, before the model."""
    queries, targets, negatives = random_rows(12, 6, seed=3), random_rows(12, 6, seed=4), random_rows(12, 2, 6, seed=5)
    targets[7] = targets[2]  # masked on one rank because of a row of another
    valid = torch.tensor([[True, index % 3 > 0] for index in range(12)])
    return queries, targets, negatives, valid


def linear_model():
    model = torch.nn.Linear(6, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(random_rows(5, 6, seed=9))
    return model


def gradient_of(model, batch, settings, passes=None, no_sync=None):
    """Loss and gradient of a linear model, and what is logged beside; by cached passes if there are any."""
    queries, targets, negatives, valid = batch
    size, shape = len(queries), negatives.shape[:2]
    items = torch.cat([queries, targets, negatives.flatten(0, 1)])

    def loss_of(rows):
        queries, targets, negatives = F.normalize(rows, dim=-1).split([size, size, valid.numel()])
        negatives = negatives.unflatten(0, shape)
        return matryoshka_info_nce(
            queries, targets, negatives, valid, temperature=0.1, gather=gather_with_grad, **settings
        )

    model.zero_grad()
    if passes is None:
        output = loss_of(model(items))
        output.loss.backward()
    else:
        groups, device = items.chunk(passes), torch.device("cpu")
        output = cached_step(model, groups, loss_of, torch.Tensor.backward, device, no_sync)
    [weight] = model.parameters()
    logged = torch.stack([output.positive_score, output.relevance, output.masked]).detach()
    return output.loss.detach(), weight.grad, logged, output.negative_gap


def mining_case(size):
    """40 pairs and a corpus whose first rows are their targets; every third row of it equals the row before."""
    rows = random_rows(size, 8, seed=1).float().numpy()
    rows[2::3] = rows[1 : size - 1 : 3]
    pairs = [Pair(Side(f"q{index}"), Side(f"text {index}"), (), None, None) for index in range(40)]
    corpus = Corpus([Side(f"text {index}") for index in range(size)], [set()] * size, None, [])
    targets = random_rows(40, 8, seed=2).float().numpy()
    targets[: min(40, size)] = rows[: min(40, size)]
    return pairs, corpus, random_rows(40, 8, seed=3).float().numpy(), targets, rows


def curriculum_of(accelerator):
    """R_k and D_k of tasks with more and with fewer pairs than ranks, by a prober, and the tasks drawn from them."""

    def encode(items):
        return torch.cat([random_rows(1, 3, seed=int(item.text[1:])) for item in items])

    def stream(task, count):
        sides = [Side(f"q{len(task) * 100 + index}") for index in range(2 * count)]
        return PairStream(task, [Pair(*sides[2 * row :][:2], (), None, None) for row in range(count)], 2, 0, seed=1)

    run = SimpleNamespace(
        accelerator=accelerator,
        sharded=False,
        streams={"t2t": stream("t2t", 20), "ti2v": stream("ti2v", 7), "tv2vi": stream("tv2vi", 1)},
        training=SimpleNamespace(probe_pairs=11, seed=5, temperature=0.1),
        collator=SimpleNamespace(item=lambda side, instruction, store: side),
    )
    prober = SimpleNamespace(encode=encode, reads=lambda side: True)
    scores = probe(run, torch.nn.Identity(), prober)
    draws = []
    for schedule in ("pyramid", "difficulty"):
        curriculum = Curriculum(list(run.streams), 3, 50, schedule)
        curriculum.start_epoch(0, *scores)
        draws += curriculum.draws(0)
    return scores, draws


def _rank(rank, world_size, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == dist.get_world_size() == world_size
    batch = [each.chunk(world_size)[rank] for each in joined_batch()]
    model, arrays = DistributedDataParallel(linear_model()), {}
    for name, settings in LOSSES.items():
        for passes in (None, 2 + rank):  # ranks need not make as many
            loss, gradient, logged, gap = gradient_of(model, batch, settings, passes, model.no_sync)
            loss, logged = (accelerator.reduce(each, "mean") for each in (loss, logged))
            gap = accelerator.gather(gap.reshape(1)).max()
            kind = "whole" if passes is None else "cached"
            arrays |= {f"{name} {kind} exact": np.append(gradient, loss), f"{name} {kind}": np.append(logged, gap)}

    found = [mine(*mining_case(size), MiningRules(5, 0.0, 1.0), accelerator) for size in CORPUS_SIZES]
    calls = []

    def embed(sides):
        calls.append(len(sides))
        return torch.tensor([[float(side.text[1:]), 1.0] for side, _ in sides])

    sides = [(pair.query, None) for pair in mining_case(301)[0]]
    embedded = embed_all(sides, embed, EmbeddingCache(folder, "prober"), accelerator)
    scores, draws = curriculum_of(accelerator)
    np.savez(f"{folder}/{rank}.npz", **arrays)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([found, sum(calls), embedded.tolist(), scores, draws], file)
    accelerator.end_training()


@pytest.mark.parametrize(("world_size", "embedded"), [(2, [20, 20]), (3, [14, 13, 13])])
def test_ranks_equal_one_with_the_joined_batch(tmp_path, free_port, world_size, embedded):
    mp.start_processes(_rank, (world_size, free_port, str(tmp_path)), nprocs=world_size, start_method="spawn")
    arrays = [np.load(tmp_path / f"{rank}.npz") for rank in range(world_size)]
    for name, settings in LOSSES.items():
        loss, gradient, logged, gap = gradient_of(linear_model(), joined_batch(), settings)
        for saved in arrays:
            for key in (f"{name} whole", f"{name} cached"):
                exact = {"rtol": 1e-9, "atol": 1e-12, "err_msg": key}
                np.testing.assert_allclose(saved[f"{key} exact"], np.append(gradient, loss), **exact)
                np.testing.assert_allclose(saved[key], np.append(logged, gap), rtol=1e-6, err_msg=key)

    saved = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert [calls for _, calls, *_ in saved] == embedded  # each embeds its share
    expected, draws = curriculum_of(ONE_RANK)
    for found, _, rows, scores, tasks in saved:
        assert found == [mine(*mining_case(size), MiningRules(5, 0.0, 1.0), ONE_RANK) for size in CORPUS_SIZES]
        assert rows == saved[0][2]
        assert scores == [pytest.approx(each, abs=1e-12) for each in expected]
        assert tasks == draws
