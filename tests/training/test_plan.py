"""What `--plan` prints of the published recipes: closed forms, and no weights, no GPU, no network."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

from training.arguments import parse_arguments
from training.embedding import Encoder
from training.plan import (
    CLOCK_TOKENS,
    PUBLISHED,
    TEXT_TOKENS,
    count_parameters,
    format_plan,
    make_plan,
    memory_of,
    meta_model,
)
from training.pyramid import main


TRAINING = Path(__file__).parents[2] / "training"


def recipe(size, *words):
    return parse_arguments(["--config", str(TRAINING / f"recipes/gve_{size}.yaml"), *words])


QWEN3 = ("--model", "Qwen/Qwen3-VL-8B-Instruct")


@cache
def model_of(size, *words):
    return meta_model(recipe(size, *words)[0])


@pytest.mark.parametrize(("size", "pairs", "tasks"), [("3b", 12_443_000, 37), ("7b", 13_903_000, 38)])
def test_recipes_hold_the_papers_numbers(size, pairs, tasks):
    model, data, training = recipe(size)
    assert len(data.tasks) == len(data.task_pairs) == tasks
    assert sum(data.task_pairs.values()) == pairs  # the columns of the paper's table, summed
    assert {data.batch_size_of(task) for task in data.tasks} == {32, 64}
    assert [data.hard_negatives_of(task) for task in ("msmarco-t2t", "cc3m-t2i", "webvid-t2v", "t2v")] == [2, 3, 0, 1]
    assert (model.method, model.lora_rank, model.lora_alpha, model.lora_dropout) == ("lora", 16, 32, 0.1)
    assert "o_proj" not in model.lora_targets
    assert (training.learning_rate, training.weight_decay, training.epochs) == (3e-5, 0.1, 3)
    assert (training.sigma_min, training.sigma_max, training.temperature, training.seed) == (0.1, 1.0, 0.03, 42)


def test_parameters_in_closed_form():
    counts = count_parameters(model_of("7b"))
    hidden, inner, kv, layers, rank = 3584, 18944, 512, 28, 16
    # A and B of each projection: rank times inputs plus outputs.
    outputs = [hidden + hidden, hidden + kv, hidden + kv, hidden + inner, hidden + inner, inner + hidden]
    assert counts["adapters"] == counts["trained"] == layers * rank * sum(outputs)
    assert counts["token embeddings"] == 152064 * hidden
    layer = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv + 3 * hidden * inner + 2 * hidden
    assert counts["language model"] == layers * layer + hidden
    assert counts["vision tower"] == pytest.approx(676e6, rel=0.01)


def test_parameters_of_qwen3_in_closed_form():
    counts = count_parameters(model_of("7b", *QWEN3))
    hidden, inner, kv, heads, layers, rank = 4096, 12288, 1024, 128, 36, 16
    outputs = [hidden + hidden, hidden + kv, hidden + kv, hidden + inner, hidden + inner, inner + hidden]
    assert counts["adapters"] == counts["trained"] == layers * rank * sum(outputs)
    assert counts["token embeddings"] == 151936 * hidden
    layer = 2 * hidden * hidden + 2 * hidden * kv + 2 * heads + 3 * hidden * inner + 2 * hidden
    assert counts["language model"] == layers * layer + hidden
    assert counts["vision tower"] == pytest.approx(576e6, rel=0.01)  # its deepstack mergers counted in


@pytest.mark.parametrize("words", [(), QWEN3])
def test_lora_reaches_the_language_model_only(words):
    names = [name for name, parameter in model_of("3b", *words).named_parameters() if parameter.requires_grad]
    assert len(names) == 36 * 6 * 2
    assert all(".language_model.layers." in name and "lora_" in name for name in names)


def test_memory_and_steps_follow_the_recipe():
    arguments = recipe("7b")
    plan = make_plan(*arguments)
    assert plan["task"] == "pe_video-t2v" or plan["task"].endswith("2v")
    trained = plan["parameters"]["trained"]
    assert plan["memory"]["DDP"]["optimizer states"] == 8 * trained
    assert plan["memory"]["ZeRO-2"]["optimizer states"] == 8 * trained / 32
    assert plan["memory"]["ZeRO-2"]["weights"] == plan["memory"]["DDP"]["weights"]
    assert plan["memory"]["FSDP2"]["weights"] < plan["memory"]["ZeRO-2"]["weights"] / 2
    mean = sum(arguments[1].batch_size_of(task) for task in arguments[1].tasks) / 38 * 32
    assert plan["steps"] == 3 * round(13_903_000 / mean)
    given = make_plan(*recipe("7b", "--plan_pairs_per_second", "2"))
    assert given["seconds"] == pytest.approx(given["steps"] * mean / 64)
    small = make_plan(*recipe("7b", "--micro_batch_size", "8"))
    part = "activations of the language model"
    assert small["memory"]["DDP"][part] < plan["memory"]["DDP"][part] / 8
    assert small["cached"] == {}
    assert plan["cached"][16] == make_plan(*recipe("7b", "--micro_batch_size", "16"))["memory"]
    assert "with micro_batch_size 64" in format_plan(plan, arguments[2])
    assert "GiB" in format_plan(plan, arguments[2])
    assert plan["disk"]["checkpoints"] == 3 * 12 * trained  # two kept, one being written
    frozen = sum(plan["parameters"][part] for part in ("vision tower", "token embeddings", "language model"))
    assert plan["disk"]["checkpoints under FSDP2"] == 3 * (12 * trained + 2 * frozen)


def test_memory_of_qwen3_counts_what_it_has_of_its_own():
    """Times as text between the frames, and vision features that enter the first decoder layers."""
    model, (starts_from, data, training) = model_of("7b", *QWEN3), recipe("7b", *QWEN3)
    items, parameters = Counter({"t": 64, "v": 64, "query": 64}), count_parameters(model)
    visual, clock = 64 * 4 * 199, 64 * 4 * CLOCK_TOKENS
    memory = memory_of("ZeRO-2", parameters, items, model, starts_from, training)
    layer = 2 * (6 * 4096 + 3 * 12288)
    tokens = 2 * 64 * TEXT_TOKENS + visual + clock
    assert memory["activations of the language model"] == tokens * (36 * 2 * 4096 + layer)
    inside, deep = 2 * (6 * 1152 + 2 * 4304), 3 * 2 * 4096
    assert memory["activations of the vision tower"] == visual * (4 * inside + deep)
    plan = make_plan(starts_from, data, training)
    assert plan["memory"]["FSDP2"]["weights"] < plan["memory"]["DDP"]["weights"] / 2


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_published_backbone_has_a_plan(name):
    counts = count_parameters(model_of("7b", "--model", name))
    billions = sum(counts[part] for part in ("vision tower", "token embeddings", "language model")) / 1e9
    size = float(re.search(r"(\d+)B", name)[1])
    assert 0.9 * size < billions < 1.3 * size


def test_plan_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(TRAINING / "recipes/gve_7b.yaml"), "--plan"])
    assert stop.value.code == 0
    assert "ZeRO-3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--config", str(TRAINING / "recipes/gve_7b.yaml"), "--plan", "--model", "no/such-model"])
    assert "no shape of model 'no/such-model' to plan with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_configs_are_parsed(name):
    config = load_config_from_file(str(TRAINING / f"accelerate/{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert getattr(config.distributed_type, "value", config.distributed_type) == kinds[name]
    assert config.mixed_precision == "bf16"
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize(("words", "layers"), [((), 28), (QWEN3, 36)])
def test_fsdp2_wraps_each_decoder_layer_and_nothing_else(words, layers):
    settings = yaml.safe_load((TRAINING / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    assert "fsdp_transformer_layer_cls_to_wrap" not in settings  # or one backbone's class would be asked of the other
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
    )
    encoder = Encoder(model_of("7b", *words))
    plugin.set_auto_wrap_policy(encoder)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, encoder)
    wrapped = [name for name, module in encoder.named_modules() if policy(module)]
    assert len(wrapped) == layers
    assert all(".language_model.layers." in name for name in wrapped)
    assert all(parameter.device == torch.device("meta") for parameter in encoder.parameters())
