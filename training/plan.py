"""What a recipe will need, before anything is downloaded: steps, GPU memory by component, hours, disk.

The model is built on the meta device from its published shape, so neither weights nor a GPU are wanted. Steps follow
from the recipe; memory, hours and disk are estimates, whose assumptions stand at the top and are printed beside them.
"""

import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import torch
from transformers import AutoConfig, PretrainedConfig

from modeling_gve import GVEConfig, GVEModel
from training.streaming import WINDOWS_KEPT, row_groups
from training.weights import make_trainable


# Published backbones, whose shapes GVE knows.
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "gve-3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "gve-7b",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3-vl-2b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3-vl-4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-vl-8b",
}

# Not in the paper, all of them: assumptions of the estimates.
TEXT_TOKENS = 96  # of an item: system text, chat turn and a caption
CLOCK_TOKENS = 10  # of a step of frames where their times are text (Qwen3-VL), such as `<12.5 seconds>`, and its marks
DEVICE_FLOPS = 312e12  # an A100's bf16 peak
UTILISATION = 0.4  # the share of it that training reaches
GIB = 2**30
PARTS = ("vision tower", "token embeddings", "language model", "adapters")
STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
MICRO_BATCHES = (64, 16)  # of gradient caching, shown to those whose recipe does without


def print_plan(starts_from, data, training):
    """Print the plan of a recipe.

    Raises:
        ValueError: the model's shape or the number of pairs cannot be found out.
    """
    print(format_plan(make_plan(starts_from, data, training), training))


def make_plan(starts_from, data, training):
    """Numbers of a plan.

    Args:
        starts_from ([`ModelArguments`]), data ([`DataArguments`]), training ([`TrainingArguments`]): the recipe.

    Returns:
        `dict`: `parameters` by part and `trained`; `pairs` by task; `steps_per_epoch`, `steps`, `queries_a_step`
        (mean over tasks); `memory` bytes of each component by strategy, for the task that needs most; `task` its name;
        `cached` the same by micro-batch size, where the recipe has none; `seconds`, `pairs_per_second` a GPU; `disk`
        bytes by part; `missing` libraries.
    """
    model = meta_model(starts_from)
    devices = training.plan_devices
    pairs = {task: _pairs_of(data, task) for task in data.tasks}
    queries = {task: data.batch_size_of(task) * devices for task in data.tasks}
    mean_queries = sum(queries.values()) / len(queries)
    upsampled = sum(count * data.task_upsampling.get(task, 1) for task, count in pairs.items())
    steps_per_epoch = training.steps_per_epoch or max(1, round(upsampled / mean_queries))
    steps = training.epochs * steps_per_epoch
    items = {task: _items(data, task) for task in data.tasks}
    heaviest = max(data.tasks, key=lambda task: _tokens(items[task], model.config).total())
    parameters = count_parameters(model)

    def memory_with(settings):
        parts = (parameters, items[heaviest], model, starts_from, settings)
        return {strategy: memory_of(strategy, *parts) for strategy in STRATEGIES}

    cached = [replace(training, micro_batch_size=size) for size in MICRO_BATCHES if training.micro_batch_size is None]
    flops = {task: _flops(items[task], parameters, model.config, starts_from, training) for task in data.tasks}
    weights = {task: pairs[task] * data.task_upsampling.get(task, 1) / queries[task] for task in data.tasks}
    mean_flops = sum(flops[task] * weights[task] for task in data.tasks) / sum(weights.values())
    rate = training.plan_pairs_per_second or mean_queries / devices / (mean_flops / (DEVICE_FLOPS * UTILISATION))
    return {
        "parameters": parameters,
        "pairs": pairs,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "queries_a_step": mean_queries,
        "task": heaviest,
        "memory": memory_with(training),
        "cached": {settings.micro_batch_size: memory_with(settings) for settings in cached},
        "pairs_per_second": rate,
        "seconds": steps * mean_queries / devices / rate,
        "disk": disk_of(parameters, pairs, model.config, starts_from, data, training),
        "missing": _missing_libraries(starts_from, training),
    }


def meta_model(starts_from):
    """The recipe's model on the meta device, with what learns marked as the run marks it.

    Raises:
        ValueError: the shape is neither published here nor found under the model's name.
    """
    limits = starts_from.input_limits()
    name = starts_from.model
    try:
        if name in PUBLISHED:
            config = GVEConfig.from_preset(PUBLISHED[name], **limits)
        elif PretrainedConfig.get_config_dict(name)[0].get("model_type") == "gve":
            config = GVEConfig.from_pretrained(name)
        else:
            config = GVEConfig(backbone_config=AutoConfig.from_pretrained(name), **limits)
    except (OSError, KeyError) as error:
        raise ValueError(f"no shape of model {name!r} to plan with: {' '.join(str(error).split())}") from error
    with torch.device("meta"):
        model = GVEModel(config).to(getattr(torch, starts_from.dtype))
        shape_only = type(starts_from)(**vars(starts_from) | {"attn_implementation": None, "quantization": None})
        make_trainable(model, shape_only)
    return model


def count_parameters(model):
    """Parameters by part, those that learn, and those of one decoder layer.

    Args:
        model (`GVEModel`): with adapters in place or not.
    """
    counts = Counter()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "adapters"
        elif ".visual." in name:
            part = "vision tower"
        elif "embed_tokens" in name:
            part = "token embeddings"
        else:
            part = "language model"
        counts[part] += parameter.numel()
        counts["trained"] += parameter.numel() * parameter.requires_grad
        counts["layer"] += parameter.numel() * ("language_model.layers.0." in name)
    return dict(counts)


def memory_of(strategy, parameters, items, model, starts_from, training):
    """Bytes on one GPU by component.

    Args:
        strategy (`str`): of `STRATEGIES`.
        parameters (`dict`): see [`count_parameters`].
        items (`Counter`): kinds of the items of a rank's batch.
        model (`GVEModel`): its shape.
        starts_from ([`ModelArguments`]), training ([`TrainingArguments`]): the recipe.
    """
    trained, devices = parameters["trained"], training.plan_devices
    frozen = sum(parameters.get(part, 0) for part in PARTS) - trained
    packed = {"4bit": 0.5, "8bit": 1.0, None: None}[starts_from.quantization]
    size = 4 if starts_from.dtype == "float32" else 2
    held = frozen * size
    if packed is not None:
        held -= parameters["language model"] * (size - packed)
    shards = {"weights": 1, "gradients": 1, "optimizer": 1}
    gathered = 0
    if strategy != "DDP":
        shards |= {"gradients": devices, "optimizer": devices}
    if strategy in ("ZeRO-3", "FSDP2"):
        shards["weights"] = devices
        # Gathered for a pass: two decoder layers, and the root unit, which holds the vision tower.
        gathered = (2 * parameters["layer"] + parameters["vision tower"] + parameters["token embeddings"]) * size
    tokens = _tokens(items, model.config)
    longest = max(_item_tokens(kind, model.config).total() for kind in items)
    share = 1.0
    if training.micro_batch_size is not None:
        share = min(1.0, training.micro_batch_size * longest / tokens.total())
    text, vision = model.config.backbone_config.text_config, model.config.backbone_config.vision_config
    heads = text.num_attention_heads * model.backbone.language_model.layers[0].self_attn.head_dim
    layer = 2 * (4 * text.hidden_size + 2 * heads + 3 * text.intermediate_size)  # bytes a token inside one layer
    layers = text.num_hidden_layers
    kept = layers * 2 * text.hidden_size + layer if starts_from.gradient_checkpointing else layers * layer
    widened = sum(type(module) is torch.nn.Linear for module in model.backbone.visual.blocks[0].mlp.modules())
    inside = 2 * (6 * vision.hidden_size + widened * vision.intermediate_size)  # a patch in one layer of the tower
    trains_vision = starts_from.method == "full" and not starts_from.freeze_vision
    if trains_vision:
        inside = vision.depth * (2 * vision.hidden_size if starts_from.gradient_checkpointing else inside) + inside
    patches = tokens["visual"] * vision.spatial_merge_size**2
    pixels = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * 4
    # Features of inner vision layers, which enter the first decoder layers (Qwen3-VL).
    deep = 2 * text.hidden_size * len(vision.to_dict().get("deepstack_visual_indexes", ()))
    candidates = (items.total() - items["query"]) * devices
    return {
        "weights": (held + trained * 4) / shards["weights"] + gathered,
        "gradients": trained * 4 / shards["gradients"],
        "optimizer states": trained * 8 / shards["optimizer"],
        "activations of the language model": share * tokens.total() * kept,
        "activations of the vision tower": share * (patches * inside + tokens["visual"] * deep),
        "inputs": pixels if training.micro_batch_size is None else share * pixels,
        "embeddings and scores": candidates * (2 * text.hidden_size + 3 * items["query"]) * 4,
    }


def disk_of(parameters, pairs, config, starts_from, data, training):
    """Bytes on disk by part: frames, checkpoints, the trained repo."""
    total = sum(parameters[part] for part in ("vision tower", "token embeddings", "language model"))
    frozen = sum(parameters.get(part, 0) for part in PARTS) - parameters["trained"]
    learning, kept = parameters["trained"] * 12, training.save_total_limit + 1
    frames = 0
    for task, count in pairs.items():
        kinds = _items(data, task)
        each = sum(number * _stored_bytes(kind, config) for kind, number in kinds.items() if kind != "query")
        held = min(count, WINDOWS_KEPT * data.window_pairs) if data.streaming else count
        frames += held * each / kinds["query"]
    return {
        "frames": frames,
        "checkpoints": learning * kept,
        # Accelerate writes all weights of an FSDP model; elsewhere those that learn are enough.
        "checkpoints under FSDP2": (learning + frozen * (4 if starts_from.dtype == "float32" else 2)) * kept,
        "trained repo": total * 2 + parameters.get("adapters", 0) * 4,
    }


def format_plan(plan, training):
    """The plan as text."""
    devices, parameters = training.plan_devices, plan["parameters"]
    lines = ["Parameters"]
    lines += [f"  {part:<36}{parameters[part]:>16,}" for part in (*PARTS, "trained") if part in parameters]
    lines += [
        f"Steps on {devices} GPUs",
        f"  pairs in {len(plan['pairs'])} tasks{'':<21}{sum(plan['pairs'].values()):>16,}",
        f"  queries a step, mean over tasks     {plan['queries_a_step']:>16,.0f}",
        f"  steps an epoch                      {plan['steps_per_epoch']:>16,}",
        f"  steps of {training.epochs} epochs                   {plan['steps']:>16,}",
        f"Memory of a GPU in GiB, estimated, for the heaviest task ({plan['task']})",
        f"  {'':<36}" + "".join(f"{strategy:>9}" for strategy in STRATEGIES),
    ]
    for component in plan["memory"]["DDP"]:
        values = [plan["memory"][strategy][component] / GIB for strategy in STRATEGIES]
        lines.append(f"  {component:<36}" + "".join(f"{value:>9.1f}" for value in values))
    totals = [sum(plan["memory"][strategy].values()) / GIB for strategy in STRATEGIES]
    lines.append(f"  {'together':<36}" + "".join(f"{value:>9.1f}" for value in totals))
    for size, memory in plan["cached"].items():
        totals = [sum(memory[strategy].values()) / GIB for strategy in STRATEGIES]
        lines.append(f"  {f'with micro_batch_size {size}':<36}" + "".join(f"{value:>9.1f}" for value in totals))
    source = (
        "as given"
        if training.plan_pairs_per_second
        else f"estimated: {DEVICE_FLOPS / 1e12:.0f} TFLOPS at {UTILISATION:.0%}"
    )
    lines += [
        f"Time at {plan['pairs_per_second']:.2f} pairs a second and GPU ({source})",
        f"  hours                               {plan['seconds'] / 3600:>16,.1f}",
        "Disk in GiB",
    ]
    lines += [f"  {part:<36}{size / GIB:>16,.1f}" for part, size in plan["disk"].items()]
    if plan["missing"]:
        lines.append(f"Not installed here, but needed: {', '.join(plan['missing'])}")
    lines.append("Estimates count no fragmentation and no buffers of the libraries: leave a fifth of a GPU free.")
    return "\n".join(lines)


def _pairs_of(data, task):
    """Pairs of a task: as the recipe says, else as the files do."""
    if task in data.task_pairs:
        return data.max_pairs_of(task)
    try:
        return sum(rows for *_, rows in row_groups(data.pairs, task, data.split, data.max_pairs))
    except ValueError as error:
        raise ValueError(f"the plan needs the number of pairs of {task}: set task_pairs ({error})") from error


def _items(data, task):
    """Items of a rank's batch by kind, such as `{"ti": 64, "v": 128}`, and `query`, the number of pairs.

    Kinds are read off a name such as `oven-ti2ti`; where that is no help, all are videos with text.
    """
    match = re.search(r"(?:^|-)([tiv]+)2([tiv]+)(?:-|$)", task)
    query, target = match.groups() if match else ("tv", "tv")
    size = data.batch_size_of(task)
    items = Counter({query: size})
    items[target] += size * (1 + data.hard_negatives_of(task))
    items["query"] = size
    return items


def _item_tokens(kind, config):
    """Tokens of an item: `text` and `visual`."""
    if kind == "query":
        return Counter()
    frame = config.max_tokens_per_frame - 1
    steps = config.num_frames // config.backbone_config.vision_config.temporal_patch_size
    clock = config.times_in_text * ("v" in kind) * steps * CLOCK_TOKENS
    return Counter(text=TEXT_TOKENS + clock, visual=("i" in kind) * frame + ("v" in kind) * steps * frame)


def _tokens(items, config):
    total = Counter()
    for kind, number in items.items():
        for part, count in _item_tokens(kind, config).items():
            total[part] += number * count
    return total


def _flops(items, parameters, config, starts_from, training):
    """Floating-point operations of a rank's step."""
    tokens = _tokens(items, config)
    patches = tokens["visual"] * config.backbone_config.vision_config.spatial_merge_size**2
    forwards = 1 + starts_from.gradient_checkpointing + (training.micro_batch_size is not None)
    backward = 2 if starts_from.method == "full" else 1  # frozen weights need no gradient of their own
    language = 2 * parameters["language model"] * tokens.total() * (forwards + backward)
    trains_vision = starts_from.method == "full" and not starts_from.freeze_vision
    passes = forwards + 2 if trains_vision else 1 + (training.micro_batch_size is not None)
    return language + 2 * parameters["vision tower"] * patches * passes


def _stored_bytes(kind, config):
    """Bytes of an item's decoded frames."""
    vision = config.backbone_config.vision_config
    frame = (config.max_tokens_per_frame - 1) * (vision.patch_size * vision.spatial_merge_size) ** 2 * 3
    return frame * (("i" in kind) + ("v" in kind) * config.num_frames)


def _missing_libraries(starts_from, training):
    needed = {
        "flash_attn": starts_from.attn_implementation == "flash_attention_2",
        "bitsandbytes": starts_from.quantization is not None,
        "faiss": training.negative_corpus is not None,
    }
    return [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
