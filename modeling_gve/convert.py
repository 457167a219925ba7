"""Turns a Qwen2.5-VL or Qwen3-VL checkpoint, or the authors' GVE-3B or GVE-7B, into a complete GVE repo.

```bash
python -m modeling_gve.convert Alibaba-NLP/GVE-3B build/hub/org/gve-3b               # the authors' weights, our code
python -m modeling_gve.convert Qwen/Qwen3-VL-2B-Instruct build/hub/org/gve-qwen3-2b  # a body to train from
python -m modeling_gve.convert training/gve-mini-base build/base --max_tokens_per_frame 17
```

The weights are copied as they are, a few megabytes at a time, under GVE's keys and without the language-model head;
beside them lie configuration, processor, chat template, code and the stub of a card. The target appears when all of it
is there.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCardData, get_local_safetensors_metadata, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save

from hub_cards.repos import metadata, run_command
from modeling_gve import GVEConfig, GVEModel, GVEProcessor
from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files
from modeling_gve.modeling_gve import CHECKPOINT_KEYS


CHUNK_BYTES = 16 << 20
SOURCE_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
NOT_OF_THE_BODY = re.compile(r"^lm_head\.|rotary_emb\.inv_freq$")  # the head, and buffers that old versions saved
CARD = """# {name}

A GVE embedder ([arXiv 2510.27571](https://arxiv.org/abs/2510.27571)) with the weights of {source}, converted by
`python -m modeling_gve.convert`. They were neither trained nor judged in the course of it.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
embeddings = model.encode(["a red circle moves to the left", {{"video": "clip.mp4"}}])
model.similarity(embeddings, embeddings)
```

`python -m hub_cards.render` writes the full card.
"""


def convert(source, target, show_progress_bar=False, **settings):
    """Write a GVE repo with the weights of a checkpoint.

    Args:
        source (`str` or `os.PathLike`): directory or Hub id of a checkpoint that `GVEModel.from_pretrained` takes, its
            weights as safetensors.
        target (`str` or `os.PathLike`): directory to make.
        show_progress_bar (`bool`, defaults to `False`): show one, in bytes.
        settings: arguments of [`GVEConfig`], such as `num_frames`.

    Returns:
        `Path`: `target`.

    Raises:
        ValueError: the source is no such checkpoint or its weights do not fit its configuration, or the target is
            taken. Nothing is left behind.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give another folder or remove it")
    folder = source_folder(source)
    config = GVEConfig.from_pretrained(folder, **settings)
    with torch.device("meta"):
        model = GVEModel(config)
    shards = plan_shards(folder, model)
    unfinished = target.with_name(f".{target.name}.unfinished")  # of one name, so that a killed run leaves one at most
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config.backbone_config)
        GVEProcessor.from_config(config, tokenizer).save_pretrained(unfinished)
        config.architectures = [type(model).__name__]
        custom_object_save(model, unfinished, config=config)
        config.save_pretrained(unfinished)
        write_sentence_transformers_files(unfinished, config)
        for file in (file for pattern in ("LICENSE*", "NOTICE*") for file in folder.glob(pattern)):
            shutil.copyfile(file, unfinished / file.name)
        (unfinished / "README.md").write_text(_card(source, folder, target.name), encoding="utf-8")
        write_weights(folder, shards, unfinished, show_progress_bar)
        unfinished.rename(target)
    except BaseException:  # an interruption too
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def source_folder(source):
    """The folder of a checkpoint, fetched from the Hub if there is none of that name.

    Raises:
        ValueError: neither leads to one.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(os.fspath(source), allow_patterns=list(SOURCE_FILES)))
        except Exception as error:  # the Hub client raises a dozen kinds here
            raise ValueError(f"{source}: no such folder, nor a repo of the Hub ({_one_line(error)})") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source}: has no config.json; give the folder of a checkpoint")
    return folder


def plan_shards(folder, model):
    """Where each weight of a model lies in a checkpoint.

    Args:
        folder (`Path`): with `model.safetensors`, or several files and their index.
        model (`GVEModel`): on the meta device.

    Returns:
        `dict[str, dict[str, TensorInfo]]`: for each file that holds any, the model's keys in the order of the file.

    Raises:
        ValueError: a file is missing or damaged, or weights are missing, unknown, there twice, or of another shape.
    """
    try:
        files = get_local_safetensors_metadata(folder).files_metadata
        if strays := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{folder}: its index names files of other folders: {', '.join(strays)}")
        for name in files:
            with safe_open(folder / name, framework="pt"):
                pass  # checks that header and size agree
    except NotASafetensorsRepoError as error:
        raise ValueError(
            f"{folder}: has no model.safetensors, nor its index; save it with safetensors first"
        ) from error
    except (SafetensorsParsingError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: weights are missing or damaged ({_one_line(error)})") from error
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    shards, found, problems = {}, set(), []
    for file, content in files.items():
        shards[file] = {}
        in_order = sorted(content.tensors.items(), key=lambda entry: entry[1].data_offsets)
        for key, info in ((gve_key(key), info) for key, info in in_order if not NOT_OF_THE_BODY.search(key)):
            if key not in shapes:
                problems.append(f"{key} is unknown")
            elif key in found:
                problems.append(f"{key} is there twice")
            elif info.shape != shapes[key]:
                problems.append(f"{key} is of shape {info.shape} instead of {shapes[key]}")
            found.add(key)
            shards[file][key] = info
    problems += [f"{key} is missing" for key in shapes if key not in found]
    if problems:
        raise ValueError(f"{folder}: weights and config.json do not fit: {'; '.join(problems)}")
    return {file: tensors for file, tensors in shards.items() if tensors}


def gve_key(key):
    """A checkpoint's key as `GVEModel` has it."""
    for pattern, replacement in CHECKPOINT_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def write_weights(source, shards, target, show_progress_bar=False):
    """Copy weights, a shard a shard, with an index if there are several.

    Args:
        source (`Path`): folder of the checkpoint.
        shards (`dict`): of `plan_shards`.
        target (`Path`): folder to write to.
        show_progress_bar (`bool`, defaults to `False`): show one, in bytes.
    """
    total = sum(_size(info) for tensors in shards.values() for info in tensors.values())
    weight_map = {}
    with tqdm(total=total, desc="convert", unit="B", unit_scale=True, disable=not show_progress_bar) as progress:
        for number, (file, tensors) in enumerate(shards.items(), start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            _copy_shard(source / file, tensors, target / name, progress)
            weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_shard(source, tensors, target, progress):
    """The layout of a safetensors file: length of the header, header, bytes of the tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, info in tensors.items():
        start, end = end, end + _size(info)
        header[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        data = 8 + int.from_bytes(reader.read(8), "little")
        writer.write(len(header).to_bytes(8, "little") + header)
        for info in tensors.values():
            reader.seek(data + info.data_offsets[0])
            left = _size(info)
            while left:
                chunk = reader.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ValueError(f"{source}: ended early; it was changed while it was read")
                writer.write(chunk)
                left -= len(chunk)
                progress.update(len(chunk))


def _size(info):
    return info.data_offsets[1] - info.data_offsets[0]


def _card(source, folder, name):
    known = metadata(folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["gve", "video-retrieval", "multimodal-embedding", "custom_code"],
        base_model=None if Path(source).is_dir() else os.fspath(source),
        **{key: known[key] for key in ("license", "license_name", "license_link") if key in known},
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + CARD.format(name=name, source=source)


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def main(words=None):
    parser = argparse.ArgumentParser(prog="modeling_gve.convert", description="Makes a GVE repo of a checkpoint.")
    parser.add_argument("source", help="folder or Hub name of a Qwen2.5-VL, Qwen3-VL or the authors' GVE")
    parser.add_argument("target", help="folder to make")
    parser.add_argument("--num_frames", type=int, help="frames read from a video (default 8)")
    parser.add_argument("--max_tokens_per_frame", type=int, help="a frame gets fewer visual tokens (default 200)")
    parser.add_argument("--max_length", type=int, help="most tokens of an input (default 8192)")
    parser.add_argument("--instruction", help="system text of inputs that bring none")
    settings = vars(parser.parse_args(words))
    source, target = settings.pop("source"), settings.pop("target")
    settings = {name: value for name, value in settings.items() if value is not None}
    print(convert(source, target, show_progress_bar=True, **settings))


if __name__ == "__main__":
    run_command("modeling_gve.convert", main)
