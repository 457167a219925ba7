"""What `--plan` prints of the published recipes: closed forms, and no weights, no GPU, no network."""

from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

from training.arguments import parse_arguments
from training.plan import count_parameters, format_plan, make_plan, meta_model
from training.pyramid import Encoder, main


TRAINING = Path(__file__).parents[2] / "training"


def recipe(size, *words):
    return parse_arguments(["--config", str(TRAINING / f"recipes/gve_{size}.yaml"), *words])


@cache
def model_of(size):
    return meta_model(recipe(size)[0])


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


def test_lora_reaches_the_language_model_only():
    names = [name for name, parameter in model_of("3b").named_parameters() if parameter.requires_grad]
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
    assert "GiB" in format_plan(plan, arguments[2])


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


def test_fsdp2_wraps_each_decoder_layer_and_nothing_else():
    settings = yaml.safe_load((TRAINING / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=[settings["fsdp_transformer_layer_cls_to_wrap"]],
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
    )
    encoder = Encoder(model_of("7b"))
    plugin.set_auto_wrap_policy(encoder)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, encoder)
    wrapped = [name for name, module in encoder.named_modules() if policy(module)]
    assert len(wrapped) == 28
    assert all(".language_model.layers." in name for name in wrapped)
    assert all(parameter.device == torch.device("meta") for parameter in encoder.parameters())
