"""Cached gradients against those of one pass over the whole batch, and dropout drawn alike in both passes."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny_pairs import noise_image, noise_video

from modeling_gve import GVEConfig, GVEModel, GVEProcessor
from training.collate import PairCollator
from training.gradcache import cached_step
from training.losses import matryoshka_info_nce
from training.pairs import FrameStore, Pair, Side


KINDS = ["text", "image", "video", "mixed"]


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def trainee(request, backbone_config, qwen3_config, tokenizer):
    """A random model in float64, so that a wrong gradient shows, and its processor; of each backbone."""
    config = GVEConfig(backbone_config if request.param == "qwen2_5_vl" else qwen3_config, max_tokens_per_frame=17)
    torch.manual_seed(3)
    return GVEModel(config).double().train(), GVEProcessor.from_config(config, tokenizer)


@pytest.fixture
def collator(tmp_path, trainee):
    store = FrameStore(tmp_path, trainee[1])
    sizes = ((56, 56), (84, 56), (56, 112), (112, 84))
    store.put([("video", noise_video(seed, 10, *size)) for seed, size in enumerate(sizes)])
    store.put([("image", noise_image(seed, *size)) for seed, size in enumerate(sizes)])
    store.seal()
    return PairCollator(trainee[1], store)


def pairs_of(kind, store):
    """Four pairs with a negative each, whose media are of unlike sizes."""
    videos, images = ([key for key in store._entries if key.startswith(name)] for name in ("video", "image"))
    sides = {
        "text": [Side(f"some words, number {index} " * (index + 1)) for index in range(4)],
        "image": [Side(None, key) for key in images],
        "video": [Side(None, None, key) for key in videos],
    }
    composed = Side("as here but red", images[0])
    sides["mixed"] = [composed, sides["video"][1], sides["text"][2], Side("x", images[3], videos[0])]
    return [
        Pair(Side(f"query {index}"), side, (Side(f"other {index}"),), "Find it.", None)
        for index, side in enumerate(sides[kind])
    ]


def full_groups(collator, batch):
    return [dict(collator.processor.collate(batch.items))], torch.arange(len(batch.items))


def doubled(group):
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in group.items()}


def step(model, groups, places, batch, cached):
    def loss_of(rows):
        rows = rows[places]
        return matryoshka_info_nce(
            rows[batch.queries],
            rows[batch.targets],
            rows[batch.negatives],
            batch.negatives_valid,
            dims=[8],
            margin=None,
        )

    def embed(group):
        return model(**doubled(group)).embeddings

    model.zero_grad()
    if cached:
        output = cached_step(embed, groups, loss_of, torch.Tensor.backward, torch.device("cpu"))
    else:
        output = loss_of(torch.cat([embed(group) for group in groups]))
        output.loss.backward()
    return output.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_cached_gradients_equal_those_of_the_full_batch(trainee, collator, kind):
    model, _ = trainee
    pairs = pairs_of(kind, collator.store)
    batch = collator.batch(pairs, [pair.negatives for pair in pairs], 1)
    groups, places = collator.forward_groups(batch.items, micro_batch_size=3)
    assert max(len(group["input_ids"]) for group in groups) <= 3 < len(batch.items)
    expected_loss, expected = step(model, *full_groups(collator, batch), batch, cached=False)
    loss, gradients = step(model, groups, places, batch, cached=True)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert gradients.keys() == expected.keys()
    assert any("visual" in name for name in gradients) == (kind != "text")
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=0, msg=name)

    swapped = places.flip(0)  # rows of the wrong items do show
    assert step(model, groups, swapped, batch, cached=True)[0] != pytest.approx(expected_loss, abs=1e-3)


def test_a_lone_group_is_embedded_once_and_its_gradients_are_joined():
    weight, seen = torch.ones(3, requires_grad=True), []

    def embed(group):
        seen.append(group)
        return group * weight

    def never():
        raise AssertionError("the only backward pass must join the ranks' gradients")

    loss_of = lambda rows: SimpleNamespace(loss=rows.square().sum())  # noqa: E731
    group = torch.tensor([[1.0, 2, 3]])
    cached_step(embed, [group], loss_of, torch.Tensor.backward, torch.device("cpu"), never)
    assert len(seen) == 1 and weight.grad.tolist() == [2, 8, 18]


def test_every_backward_pass_but_the_last_leaves_gradients_on_its_rank():
    weight, alone, joined = torch.ones(1, requires_grad=True), [], []

    @contextlib.contextmanager
    def no_sync():
        alone.append(None)
        yield
        alone.pop()

    def backward(loss):
        joined.append(not alone)
        loss.backward()

    loss_of = lambda rows: SimpleNamespace(loss=rows.sum())  # noqa: E731
    groups = [torch.ones(2, 1)] * 4
    cached_step(lambda group: group * weight, groups, loss_of, backward, torch.device("cpu"), no_sync)
    assert joined == [False, False, False, True] and weight.grad.item() == 8


def test_dropout_is_drawn_alike_in_both_passes():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5)).double()
    groups = list(torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    seen = []

    def embed(group):
        seen.append(layer(group))
        return seen[-1]

    def loss_of(rows):
        return SimpleNamespace(loss=(rows - 1).square().mean())

    torch.manual_seed(1)
    cached_step(embed, groups, loss_of, torch.Tensor.backward, torch.device("cpu"))
    cached = layer[0].weight.grad.clone()
    assert len(seen) == 5  # the last is embedded once
    assert seen[1].equal(seen[3]) and seen[0].equal(seen[4])
    state = torch.get_rng_state()

    layer.zero_grad()
    torch.manual_seed(1)
    loss_of(torch.cat([layer(group) for group in groups])).loss.backward()
    torch.testing.assert_close(cached, layer[0].weight.grad)
    assert state.equal(torch.get_rng_state())
