"""Shows that a checkpoint embeds the same item alike in every way that this project offers.

```bash
python -m modeling_gve.parity build/hub/org/gve-mini           # a GVE repo, or a backbone before it becomes GVE
python -m modeling_gve.parity org/gve-3b --device cuda
python -m modeling_gve.parity build/hub/org/gve-mini --speed   # also what each shortcut saves, in this run
```

The reference is a plain forward of transformers' own body: float32, one item at a time, an explicit attention mask, no
shortcut, and the hidden state of the last token, normalised. The table holds the largest absolute difference of any
dimension, for texts, images, videos and all their compositions. The exit code is 1 if any reaches 1e-5.

Repos and checkpoints are written to a temporary folder (`TMPDIR`): three copies of the weights in float32.
"""

import argparse
import importlib.util
import inspect
import io
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files
from modeling_gve.modeling_gve import SHORTCUTS, GVEModel
from modeling_gve.processing_gve import GVEProcessor
from modeling_gve.video_gve import VideoFrames


LIMIT = 1e-5
KINDS = ("text", "image", "video", "text+image", "text+video", "image+video", "text+image+video")
INSTRUCTION = "Find the clip that the text describes."
TEXTS = ("a red square", "a small blue circle rolls slowly to the left, behind two grey boxes, and stops. " * 3)
SIZES = ((112, 84), (56, 140))  # height and width of pictures, in pixels
SPACINGS = (0.4, 1.5)  # seconds between frames
SPEED_ROUNDS = 5


def make_items():
    """16 items: two of each kind, unlike in length, size and clock, and two texts with instructions of their own.

    Returns:
        `(list of items, list of their kinds)`.
    """
    generator = np.random.default_rng(0)
    items, kinds = [], []
    for text, (height, width), spacing, encode in zip(TEXTS, SIZES, SPACINGS, (np.asarray, _png)):
        for kind in KINDS:
            names, item = kind.split("+"), {}
            if "text" in names:
                item["text"] = text
            if "image" in names:
                item["image"] = encode(_picture(generator, 1, height, width)[0])
            if "video" in names:
                item["video"] = VideoFrames(_picture(generator, 8, width, height), np.arange(8) * spacing)
            items.append(item)
            kinds.append(kind)
        items.append({"text": text, "instruction": INSTRUCTION})
        kinds.append("text")
    return items, kinds


def _picture(generator, frames, height, width):
    """Blocks of colour that change from frame to frame, uint8 of shape `(frames, height, width, 3)`."""
    blocks = generator.integers(0, 256, (frames, height // 14, width // 14, 3), dtype=np.uint8)
    return blocks.repeat(14, axis=1).repeat(14, axis=2)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@torch.no_grad()
def plain_embeddings(model, processor, items):
    """The reference: see the module. The model is left without shortcuts.

    Raises:
        RuntimeError: a part of the body is not transformers' own.
    """
    model.use_shortcuts(())
    if foreign := [name for name, module in model.backbone.named_modules() if not _is_stock(module)]:
        raise RuntimeError(f"{', '.join(foreign)}: not transformers' own, and no reference")
    taken = inspect.signature(model.backbone.forward).parameters
    rows = []
    for item in items:
        features = {name: value for name, value in processor(item).to(model.device).items() if name in taken}
        hidden = model.backbone(**features, use_cache=False).last_hidden_state
        rows.append(torch.nn.functional.normalize(hidden[:, -1].float(), dim=-1).cpu())
    return torch.cat(rows)


def _is_stock(module):
    return type(module).__module__.startswith(("transformers.", "torch."))


@torch.no_grad()
def padded(model, processor, items, side, batch_size=4):
    """Embeddings of batches padded on one side, as they come from a processor that does so."""
    parts = []
    for start in range(0, len(items), batch_size):
        batch = dict(processor(items[start : start + batch_size]))
        padding = (batch["attention_mask"] == 0).sum(1).tolist()
        if side == "left":
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                batch[name] = torch.stack([row.roll(shift) for row, shift in zip(batch[name], padding)])
        parts.append(model(**{name: value.to(model.device) for name, value in batch.items()}).embeddings.cpu())
    return torch.cat(parts)


def with_shortcuts(model, names, encode, items):
    """Embeddings under exactly these shortcuts; all are on again afterwards."""
    model.use_shortcuts(names)
    try:
        return encode(model, items)
    finally:
        model.use_shortcuts()


def shuffled(model, encode, items):
    order = np.random.default_rng(1).permutation(len(items)).tolist()
    embeddings = torch.empty(len(items), model.config.embedding_dim)
    embeddings[order] = encode(model, [items[index] for index in order])
    return embeddings


def write_backbone(model, folder, layout):
    """The model as a Qwen-VL checkpoint with a head.

    Args:
        model (`GVEModel`): whose body is written.
        folder (`Path`): made.
        layout (`str`): `"new"`, or `"legacy"`, as transformers saved Qwen2.5-VL before 4.52.
    """
    prefixes = {"visual.": "model.visual.", "language_model.": "model.language_model."}
    if layout == "legacy":
        prefixes = {"visual.": "visual.", "language_model.": "model."}
    weights = {"lm_head.weight": model.get_input_embeddings().weight.detach().cpu().clone()}
    for name, value in model.backbone.state_dict().items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        weights[prefixes[prefix] + name.removeprefix(prefix)] = value.cpu().contiguous()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.backbone_config.to_json_string(use_diff=False))
    heads = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
    config |= {"architectures": [heads[config["model_type"]]], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))


def load(path, device="cpu"):
    """Model and processor of a GVE repo or a backbone, in float32, from a folder or the Hub."""
    model = GVEModel.from_pretrained(str(path), dtype=torch.float32)
    return model.to(device).eval(), GVEProcessor.for_model(str(path), model.config)


def from_sentence_transformers(folder, device, items):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device=device)
    return model.encode(items, batch_size=4, convert_to_tensor=True).cpu()


def from_mteb(folder, device, items, kinds):
    """Embeddings by mteb's loader of documents, a dataset a kind; items with an own instruction stay NaN."""
    from mteb.types import PromptType

    from modeling_gve.mteb_gve import gve_meta

    meta = gve_meta(str(folder))
    encoder = meta.loader(meta.name, meta.revision, device=device, **meta.loader_kwargs)
    rows = {
        kind: [i for i, item in enumerate(items) if kinds[i] == kind and "instruction" not in item] for kind in KINDS
    }
    embeddings = {}
    for indices in rows.values():
        loader = DataLoader([items[index] for index in indices], batch_size=4, collate_fn=_columns)
        found = encoder.encode(
            loader, task_metadata=None, hf_split="test", hf_subset="default", prompt_type=PromptType.document
        )
        embeddings.update(zip(indices, torch.from_numpy(found)))
    missing = torch.full((encoder.model.config.embedding_dim,), float("nan"))
    return torch.stack([embeddings.get(index, missing) for index in range(len(items))])


def _columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def compare(model, processor, folder):
    """Every way of embedding, one by one.

    Args:
        model (`GVEModel`): in float32.
        processor (`GVEProcessor`): its inputs.
        folder (`Path`): where copies of the repo are written.

    Yields:
        `(str, dict or None)`: what was done, and the largest absolute difference for each kind of item; `None` where a
        library that is needed is not installed.
    """
    items, kinds = make_items()
    device = str(model.device)

    def encode(which, chosen, batch_size=4, **kwargs):
        return which.encode(chosen, processor, batch_size=batch_size, batch_tokens=10**6, **kwargs)

    expected = plain_embeddings(model, processor, items)
    model.use_shortcuts()
    ways = {f"padding on the {side}": partial(padded, model, processor, items, side) for side in ("left", "right")}
    for size in (1, 4, 16):
        ways[f"batches of {size}"] = partial(encode, model, items, batch_size=size)
    ways["shuffled"] = partial(shuffled, model, encode, items)
    ways["two decoding threads"] = partial(encode, model, items, decode_threads=2)
    ways["default token budget"] = lambda: model.encode(items, processor)
    ways["no shortcut"] = partial(with_shortcuts, model, (), encode, items)
    for name in SHORTCUTS:
        ways[f"only {name}"] = partial(with_shortcuts, model, (name,), encode, items)
        rest = [other for other in SHORTCUTS if other != name]
        ways[f"all but {name}"] = partial(with_shortcuts, model, rest, encode, items)
    repo = folder / "repo"
    model.save_pretrained(repo)
    processor.save_pretrained(repo)
    write_sentence_transformers_files(repo, model.config)
    ways["saved and reloaded"] = lambda: _encode_repo(repo, device, items)
    layouts = ["new", "legacy"] if model.config.backbone_config.model_type == "qwen2_5_vl" else ["new"]
    for layout in layouts:
        write_backbone(model, folder / layout, layout)
        ways[f"{layout} keys"] = lambda path=folder / layout: encode(_load_backbone(path, device), items)
    if importlib.util.find_spec("sentence_transformers"):
        ways["sentence-transformers"] = partial(from_sentence_transformers, repo, device, items)
    else:
        yield "sentence-transformers", None
    if importlib.util.find_spec("mteb"):
        ways["mteb"] = partial(from_mteb, repo, device, items, kinds)
    else:
        yield "mteb", None
    for name, way in ways.items():
        difference = (way() - expected).abs().amax(dim=1)
        rows = {kind: [difference[i] for i in range(len(items)) if kinds[i] == kind] for kind in KINDS}
        # Of a kind's rows some may be NaN, where a library cannot express an item, but not all.
        yield name, {kind: float(torch.stack(values).nan_to_num(-1).max()) for kind, values in rows.items()}


def _encode_repo(folder, device, items):
    model, processor = load(folder, device)
    return model.encode(items, processor)


def _load_backbone(folder, device):
    return GVEModel.from_pretrained(str(folder), dtype=torch.float32).to(device).eval()


def passes(differences):
    """Whether each kind was compared and stays below the limit; NaN does not."""
    return all(0 <= value < LIMIT for value in differences.values())


def measure_speed(model, processor):
    """What shortcuts save: medians of paired rounds of this run, as `{kind: {shortcuts: ratio of times}}`."""
    items, kinds = make_items()
    chosen = {kind: [item for item, its in zip(items, kinds) if its == kind] * 4 for kind in ("text", "video")}
    settings = {"all": SHORTCUTS, **{f"only {name}": (name,) for name in SHORTCUTS}}
    ratios = {}
    for kind, some in chosen.items():
        times = {name: [] for name in ("none", *settings)}
        for _ in range(SPEED_ROUNDS + 1):  # the first warms up
            for name in times:
                model.use_shortcuts(settings.get(name, ()))
                start = time.perf_counter()
                model.encode(some, processor)
                times[name].append(time.perf_counter() - start)
        ratios[kind] = {
            name: statistics.median(none / each for none, each in zip(times["none"][1:], times[name][1:]))
            for name in settings
        }
    model.use_shortcuts()
    return ratios


def main(words=None):
    parser = argparse.ArgumentParser(
        prog="modeling_gve.parity", description="Same embeddings in every way, or exit 1."
    )
    parser.add_argument("path", help="a GVE repo or a backbone: folder, or name on the Hub")
    parser.add_argument("--device", default="cpu", help="where it runs (default: %(default)s)")
    parser.add_argument("--speed", action="store_true", help="also print what each shortcut saves")
    arguments = parser.parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        model, processor = load(arguments.path, arguments.device)
    except (OSError, ValueError) as error:
        print(
            f"modeling_gve.parity: cannot load {arguments.path}: {str(error).partition(chr(10))[0]}", file=sys.stderr
        )
        return 2
    table = Table("", *KINDS, title=f"{arguments.path}: largest difference to transformers' own body, float32")
    failed = []
    with tempfile.TemporaryDirectory(prefix="gve-parity-") as folder:
        for name, differences in compare(model, processor, Path(folder)):
            if differences is None:
                console.print(f"{name}: not run, it is not installed", highlight=False)
                continue
            console.print(f"{name}: done", highlight=False)
            if not passes(differences):
                failed.append(name)
            table.add_row(
                name,
                *(
                    f"{value:.1e}" if passes({kind: value}) else f"[red]{value:.1e}"
                    for kind, value in differences.items()
                ),
            )
    console.print(table)
    if arguments.speed:
        speed = Table("times as fast as without shortcuts", "text", "video")
        ratios = measure_speed(model, processor)
        for name in ratios["text"]:
            speed.add_row(name, *(f"{ratios[kind][name]:.2f}" for kind in ("text", "video")))
        console.print(speed)
    if failed:
        print(f"modeling_gve.parity: FAILED, {LIMIT:g} or more apart: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"All differences are below {LIMIT:g}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
