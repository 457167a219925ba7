"""Conversion: the same weights and embeddings from every layout, a complete repo, little memory, all or nothing."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_backbones import body_embeddings, write_checkpoint
from transformers import Qwen3VLForConditionalGeneration

import modeling_gve
from modeling_gve import GVEModel, GVEProcessor
from modeling_gve.convert import convert, main
from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files


PROGRAM = """
import resource, sys
from modeling_gve.convert import convert

baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) << 10)
"""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_layout_of_an_untied_checkpoint_gives_the_same(
    legacy, sharded, full_model, tokenizer, family_model, family_processor, items, tmp_path
):
    source = write_checkpoint(tmp_path / "source", full_model, tokenizer, legacy, sharded)
    target = convert(source, tmp_path / "target", max_tokens_per_frame=17)
    shards = sorted(target.glob("*.safetensors"))
    weights = {key: value for file in shards for key, value in load_file(file).items()}
    assert set(weights) == set(family_model.state_dict()) and len(shards) > sharded
    assert all(torch.equal(weights[key], value) for key, value in family_model.state_dict().items())
    model, info = GVEModel.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.encode(items), family_model.encode(items, family_processor))
    expected = body_embeddings(full_model, family_processor(items))
    torch.testing.assert_close(model.encode(items), expected, rtol=0, atol=1e-5)


def test_a_converted_repo_is_as_complete_as_a_saved_one(full_model, tokenizer, tmp_path):
    source = write_checkpoint(tmp_path / "source", full_model, tokenizer, legacy=True, tied=True)
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: research\n---\n")
    limits = {"max_tokens_per_frame": 17, "num_frames": 4, "max_length": 500, "instruction": 'Say "yes".'}
    target = convert(source, tmp_path / "target", **limits)
    model = GVEModel.from_pretrained(source, **limits)
    model.save_pretrained(tmp_path / "saved")
    GVEProcessor.for_model(source, model.config).save_pretrained(tmp_path / "saved")
    write_sentence_transformers_files(tmp_path / "saved", model.config)
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert "chat_template.jinja" in saved and "modeling_gve.py" in saved
    converted = {file.name: file.read_bytes() for file in target.iterdir()}
    assert set(converted) == {*saved, "README.md", "LICENSE"}
    for name in set(saved) - {"model.safetensors", "config.json"}:  # tensors may stand in another order
        assert converted[name] == saved[name], name
    ours, theirs = (json.loads(files["config.json"]) for files in (converted, saved))
    assert ours["dtype"] == theirs["dtype"] and without_dtypes(ours) == without_dtypes(theirs)
    processor = GVEProcessor.from_pretrained(target)
    assert all(getattr(processor, name) == value for name, value in limits.items())
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "other" and card.data.license_name == "research" and "target" in card.text


def without_dtypes(config):
    """A configuration without its parts' own dtypes, which a loaded model fills in."""
    if not isinstance(config, dict):
        return config
    return {key: without_dtypes(value) for key, value in config.items() if key != "dtype"}


def test_the_command_prints_the_folder_or_one_line(full_model, tokenizer, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", full_model, tokenizer)
    main([str(source), str(tmp_path / "target"), "--max_tokens_per_frame", "17"])
    assert capsys.readouterr().out == f"{tmp_path / 'target'}\n"
    assert GVEModel.from_pretrained(tmp_path / "target").config.max_tokens_per_frame == 17
    with pytest.raises(ValueError, match="target: is there already"):
        main([str(source), str(tmp_path / "target")])


def damage(source, kind):
    """Break a checkpoint; returns what the error has to say."""
    file = source / "model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    if kind == "missing":
        del weights[key]
        save_file(weights, file)
        return "do not fit: backbone.language_model.layers.1.mlp.up_proj.weight is missing$"
    if kind == "unknown":
        save_file({**weights, "adapter.weight": weights[key].clone()}, file)
        return "adapter.weight is unknown$"
    if kind == "twice":
        save_file({**weights, key.replace("model.", "backbone.", 1): weights[key].clone()}, file)
        return "up_proj.weight is there twice$"
    if kind == "shape":
        save_file({**weights, key: weights[key][1:].clone()}, file)
        return r"up_proj.weight is of shape \[63, 32\] instead of \[64, 32\]$"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "weights are missing or damaged"
    if kind == "outside":
        file.rename(source.parent / "other.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../other.safetensors")}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        return "its index names files of other folders: ../other.safetensors"
    file.rename(source / "pytorch_model.bin")
    return "has no model.safetensors, nor its index"


@pytest.mark.parametrize("kind", ["missing", "unknown", "twice", "shape", "truncated", "outside", "bin"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_nothing(kind, full_model, tokenizer, tmp_path):
    source = write_checkpoint(tmp_path / "source", full_model, tokenizer)
    message = damage(source, kind)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "build" / "target")
    assert not (tmp_path / "build").exists()


def test_a_source_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing: no such folder, nor a repo of the Hub"):
        convert("nobody/nothing", tmp_path / "target")
    with pytest.raises(ValueError, match="has no config.json"):
        convert(tmp_path, tmp_path / "target")


def test_an_interrupted_conversion_leaves_nothing_and_a_killed_one_is_replaced(
    full_model, tokenizer, tmp_path, monkeypatch
):
    source = write_checkpoint(tmp_path / "source", full_model, tokenizer, sharded=True)
    copied = []

    def interrupt(self, count):
        copied.append(count)
        if len(copied) > 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeling_gve.convert.tqdm.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / ".target.unfinished").mkdir()
    (tmp_path / ".target.unfinished/stale.safetensors").write_bytes(b"left by a killed run")
    convert(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert "stale.safetensors" not in {path.name for path in (tmp_path / "target").iterdir()}


def write_random_checkpoint(folder, config, tokenizer, shard_bytes):
    """Untied random weights in bfloat16, never more of them in memory than a shard."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen3VLForConditionalGeneration(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    shard, size, weight_map = {}, 0, {}
    for name, shape in [*shapes.items(), (None, None)]:
        if shard and (name is None or size > shard_bytes):
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
        if name is not None:
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            shard[name], size = bits.view(torch.bfloat16), size + bits.nbytes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def grown(config, **text):
    config = copy.deepcopy(config)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    return config


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_conversion_holds_no_weights_in_memory(qwen3_config, tokenizer, tmp_path):
    config = grown(qwen3_config, hidden_size=1024, vocab_size=40_000)
    size = write_random_checkpoint(tmp_path / "source", config, tokenizer, 100 << 20)
    assert size > 150 << 20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    convert(tmp_path / "source", tmp_path / "target")
    assert resident("VmHWM") - before < 60 << 20


def resident(field):
    """Bytes of memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_converting_two_gibibytes_takes_less_than_one(qwen3_config, tokenizer, tmp_path):
    config = grown(qwen3_config, hidden_size=2048, intermediate_size=8192, num_hidden_layers=13, vocab_size=151_936)
    assert write_random_checkpoint(tmp_path / "source", config, tokenizer, 1 << 30) > 2 << 30
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path / "target")],
        cwd=Path(modeling_gve.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1 << 30
