"""Which weights learn, and that the merged model is the adapted one."""

import hashlib
import shutil

import pytest
import torch
from rendering import draw_frames
from safetensors.torch import load_file
from tiny_runs import steps_of, words_of

from modeling_gve import GVEModel
from training.arguments import ModelArguments
from training.pyramid import main, prepare, train
from training.weights import (
    ADAPTER,
    add_lora,
    export_model,
    load_model,
    make_trainable,
    merge_adapter,
    quantize_language_model,
)


ITEMS = ["a red square", "moves left, then right"]


@pytest.fixture(scope="module")
def lora_run(recipe, base_model, tmp_path_factory):
    """Output directory of a run with LoRA, dropout and gradient caching."""
    output_dir = tmp_path_factory.mktemp("lora")
    words = ["--method", "lora", "--lora_rank", "2", "--micro_batch_size", "3", "--epochs", "1"]
    main(words_of(recipe, output_dir, *words))
    return output_dir


def hashes(state):
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def test_lora_trains_nothing_but_its_adapters(recipe, base_model, tmp_path):
    """By name and by hash, in the model that was trained itself."""
    words = ["--method", "lora", "--lora_rank", "2", "--epochs", "1", "--schedule", "uniform"]
    run = prepare(words_of(recipe, tmp_path, *words))
    before = hashes(run.model.state_dict())
    train(run)
    assert {step["task"] for step in steps_of(tmp_path)} >= {"t2v", "i2v"}  # the vision tower has run
    after = hashes(run.model.state_dict())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "lora_" in name}
    assert all(".language_model.layers." in name for name in changed)
    assert not any("visual" in name or "embed_tokens" in name for name in changed)


def test_lora_changes_no_visual_and_no_embedding_weight(lora_run, base_model):
    before, after = GVEModel.from_pretrained(str(base_model)).state_dict(), load_file(lora_run / "model.safetensors")
    before, after = hashes(before), hashes(after)
    changed = {name for name in before if before[name] != after[name]}
    adapted = {f"{name}.weight" for name in adapted_layers(before)}
    assert changed == adapted
    assert not any("visual" in name or "embed_tokens" in name or "o_proj" in name for name in changed)
    names = load_file(lora_run / ADAPTER / "adapter_model.safetensors").keys()
    assert {name.partition("base_model.model.")[2].partition(".lora_")[0] for name in names} == adapted_layers(before)


def adapted_layers(state):
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")
    names = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    return {name for name in names if ".language_model.layers." in name and name.endswith(kinds)}


def test_merged_equals_adapter(lora_run, base_model):
    from peft import PeftModel

    arguments = ModelArguments(model=str(base_model), max_tokens_per_frame=17)
    base, processor = load_model(arguments)
    inputs = processor([*ITEMS, {"image": draw_frames(1)[0], "text": "to the left"}])
    with torch.no_grad():
        plain = base(**inputs).embeddings
        adapted = PeftModel.from_pretrained(base, str(lora_run), subfolder=ADAPTER).eval()(**inputs).embeddings
        merged = merge_adapter(load_model(arguments)[0], lora_run / ADAPTER).eval()(**inputs).embeddings
        published = GVEModel.from_pretrained(lora_run).eval()(**inputs).embeddings
    assert (adapted - plain).abs().max() > 1e-4  # it has learnt
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    torch.testing.assert_close(published, merged, atol=0, rtol=0)
    assert f'"{lora_run}", subfolder="adapter")' in (lora_run / ADAPTER / "README.md").read_text()
    assert (lora_run / "curriculum.png").stat().st_size > 1000
    assert all(step["grad_norm"] > 0 for step in steps_of(lora_run))


def test_full_training_leaves_no_adapter_of_an_earlier_run(lora_run, gve_config, tmp_path):
    shutil.copytree(lora_run / ADAPTER, tmp_path / ADAPTER)
    model = GVEModel(gve_config)
    assert export_model(model, ModelArguments(), tmp_path) == (model, None)
    assert not (tmp_path / ADAPTER).exists()


def test_full_training_freezes_what_it_is_told(gve_config):
    def learns(**settings):
        model = make_trainable(GVEModel(gve_config), ModelArguments(**settings))
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [any(part in name for name in names) for part in ("visual", "embed_tokens", "o_proj")]

    assert learns() == [False, True, True]
    assert learns(freeze_vision=False) == [True, True, True]
    assert learns(freeze_embeddings=True) == [False, False, True]


def test_gradient_checkpointing_gives_the_same_gradients(gve_config, processor):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_trainable(GVEModel(gve_config), ModelArguments(gradient_checkpointing=checkpointing)).train()
        assert model.backbone.language_model.gradient_checkpointing == checkpointing
        model(**processor(ITEMS)).embeddings[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "lora", "lora_targets": ["q_proj", "fc1"]},
            "lora_targets names fc1, but layers have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"attn_implementation": "slow"}, "attn_implementation 'slow': "),
    ],
)
def test_settings_that_the_model_does_not_have(gve_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainable(GVEModel(gve_config), ModelArguments(**settings))


def test_attention_without_its_library(gve_config, monkeypatch):
    def refuse(self, name):
        raise ImportError("flash_attn is not installed")

    monkeypatch.setattr(GVEModel, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="attn_implementation 'flash_attention_2': flash_attn is not installed"):
        make_trainable(GVEModel(gve_config), ModelArguments(attn_implementation="flash_attention_2"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_base_learns_through_its_adapters(gve_config, processor, bits):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = GVEModel(gve_config).eval()
    with torch.no_grad():
        exact = model(**processor(ITEMS)).embeddings
    quantize_language_model(model, bits)
    model = add_lora(model, ModelArguments(method="lora")).to("cpu").eval()
    with torch.no_grad():
        model(**processor(ITEMS))  # as the probe does
    model.train()
    rows = model(**processor(ITEMS)).embeddings
    assert (rows * exact).sum(-1).min() > 0.5  # adapters start at 0, so only packing and dropout tell them apart
    rows[:, 0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_quantisation_without_its_library(gve_config, monkeypatch):
    monkeypatch.setattr("training.weights.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="quantization needs bitsandbytes: pip install bitsandbytes"):
        make_trainable(GVEModel(gve_config), ModelArguments(method="lora", quantization="4bit"))
