"""The weights of a run: where they start, which of them learn, and how they leave it."""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig

from modeling_gve import GVEModel, GVEProcessor


ADAPTER = "adapter"  # folder of the adapter inside the trained repo
# Linear layers of the language model only: a plain list of names would also hit the vision tower's MLPs.
LORA_TARGETS = r"(?:.*\.)?language_model\..*\.({})"
_ADAPTER_CARD = """# Adapter

The LoRA of this repo's model, before it was merged. Load it onto the weights it was trained from:

```python
from peft import PeftModel
from modeling_gve import GVEModel

model = PeftModel.from_pretrained(GVEModel.from_pretrained("{base}"), "{repo}", subfolder="{folder}")
```
"""


def load_model(arguments):
    """The starting weights and their processor.

    Args:
        arguments ([`ModelArguments`]): `model`, `dtype` and the limits of an input.

    Raises:
        ValueError: the name leads to no model that GVE can start from.
    """
    dtype = getattr(torch, arguments.dtype)
    try:
        config = PretrainedConfig.get_config_dict(arguments.model)[0]
        if config.get("model_type") == "gve":
            model = GVEModel.from_pretrained(arguments.model, dtype=dtype)
        else:
            model = GVEModel.from_pretrained(arguments.model, dtype=dtype, **arguments.input_limits())
        return model, GVEProcessor.for_model(arguments.model, model.config)
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot start from model {arguments.model!r}: {' '.join(str(error).split())}") from error


def make_trainable(model, arguments):
    """Freeze what stays as it is, and add what learns beside it.

    With `method` "lora" only adapters on the language model's projections learn; with "full" all weights, less the
    vision tower where `freeze_vision` is set and the token embeddings where `freeze_embeddings` is.

    Args:
        model (`GVEModel`): changed in place.
        arguments ([`ModelArguments`]): see its fields.

    Returns:
        `torch.nn.Module`: what is trained; a `PeftModel` with LoRA.

    Raises:
        ValueError: a library for a quantised base or an attention is missing, or no layer bears a target's name.
    """
    if arguments.attn_implementation is not None:
        try:
            model.set_attn_implementation(arguments.attn_implementation)
        except (ImportError, ValueError) as error:
            raise ValueError(f"attn_implementation {arguments.attn_implementation!r}: {error}") from error
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.method == "full":
        model.backbone.visual.requires_grad_(not arguments.freeze_vision)
        if arguments.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        return model
    if arguments.quantization is not None:
        quantize_language_model(model, arguments.quantization)
    return add_lora(model, arguments)


def add_lora(model, arguments):
    """The model with LoRA on its language model's projections, everything else frozen.

    Raises:
        ValueError: no layer bears a target's name; peft asks for one match in all.
    """
    layers = model.backbone.language_model.layers.named_modules()
    known = {name.rpartition(".")[2] for name, layer in layers if isinstance(layer, torch.nn.Linear)}
    unknown = [name for name in arguments.lora_targets if name not in known]
    if unknown:
        raise ValueError(f"lora_targets names {', '.join(unknown)}, but layers have {', '.join(sorted(known))}")
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=LORA_TARGETS.format("|".join(arguments.lora_targets)),
        bias="none",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = arguments.model
    return adapted


def quantize_language_model(model, bits):
    """Replace the language model's linear layers by bitsandbytes' frozen 4-bit (NF4) or 8-bit ones, as QLoRA does.

    Args:
        model (`GVEModel`): changed in place; the weights are packed when it moves to its device.
        bits (`str`): `"4bit"` or `"8bit"`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantization needs bitsandbytes: pip install bitsandbytes")
    import bitsandbytes  # optional: only a quantised base needs it

    language_model = model.backbone.language_model
    for name, layer in list(language_model.named_modules()):
        if type(layer) is not torch.nn.Linear:
            continue
        shape, bias, weight = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.data
        if bits == "4bit":
            new = bitsandbytes.nn.Linear4bit(*shape, bias=bias, compute_dtype=weight.dtype, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
            # Some CPUs' layout for inference, taken at the first probe, has no backward pass.
            new.support_avx512bf16_for_cpu = False
        else:
            new = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if bias:
            new.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent), child, new)


def trained_state(model, state=None):
    """Tensors of the parameters that learn, by name.

    Args:
        model (`torch.nn.Module`): as `make_trainable` returned it.
        state (`dict`, *optional*): its gathered state dict, where its weights are sharded.
    """
    state = model.state_dict() if state is None else state
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().cpu() for name, tensor in state.items() if name in names}


def export_model(model, arguments, output_dir, state=None, repo=None):
    """The model to publish, in the precision that its weights start from.

    A LoRA run's adapter is written to `output_dir/adapter` first, and merged into freshly loaded starting weights, so
    that a quantised base loses nothing.

    Args:
        model (`torch.nn.Module`): as `make_trainable` returned it.
        arguments ([`ModelArguments`]): of the run.
        output_dir (`str`): the trained GVE repo.
        state (`dict`, *optional*): the model's gathered state dict, where its weights are sharded.
        repo (`str`, *optional*): its name on the Hub, for the adapter's card. Default: `output_dir`.

    Returns:
        `tuple` of the `GVEModel` and the state dict to save, None for its own.
    """
    folder = Path(output_dir) / ADAPTER
    if not isinstance(model, PeftModel):
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run: it is not part of this model
        if state is not None:  # FSDP2 and DeepSpeed train in precisions of their own
            dtype = getattr(torch, arguments.dtype)
            model, state = model.to(dtype), {name: tensor.to(dtype) for name, tensor in state.items()}
        return model, state
    model.save_pretrained(folder, state_dict=trained_state(model, state))
    card = _ADAPTER_CARD.format(base=arguments.model, repo=repo or output_dir, folder=ADAPTER)
    (folder / "README.md").write_text(card)
    return merge_adapter(load_model(arguments)[0], folder), None


def merge_adapter(base, folder):
    """A `GVEModel` with a saved adapter added to its weights."""
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def weights_digest(model):
    """Twelve digits that tell starting weights apart, from samples of each tensor; all ranks call this together."""
    digest, parameters = hashlib.sha256(), dict(model.named_parameters())
    for name, tensor in sorted(model.state_dict().items()):
        if hasattr(parameters.get(name), "ds_shape"):
            tensor = _gathered(parameters[name])
        values = tensor.detach().flatten()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values[:: max(1, len(values) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _gathered(parameter):
    """A whole copy of what ZeRO-3 keeps in shards."""
    from deepspeed import zero  # where shards are, it is installed

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
