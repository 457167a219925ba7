"""Checkpoints that are whole or absent, so that a killed run goes on where it was.

A checkpoint holds the weights that learn, optimiser, scheduler and random states of every rank, as accelerate saves
them, and `progress.json`: step, position in each task's data, the curriculum's history, the settings. It is written
under a temporary name and renamed last.
"""

import errno
import json
import os
import shutil
import socket
from pathlib import Path

from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from training.pairs import delete_folder
from training.weights import trained_state


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

PREFIX = "checkpoint-"
TRAINED = "trained.safetensors"


def checkpoints(run_dir):
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in Path(run_dir).glob(f"{PREFIX}*") if path.is_dir())


def save_checkpoint(accelerator, run_dir, progress, keep):
    """Write a checkpoint and delete the oldest ones; every rank calls this.

    Args:
        accelerator (`Accelerator`): its prepared and registered objects are saved.
        run_dir (`str` or `os.PathLike`): where checkpoints lie.
        progress (`dict`): JSON values, with `step`, the number of finished steps.
        keep (`int`): how many checkpoints stay.

    Returns:
        `Path` of the checkpoint.
    """
    final = Path(run_dir) / f"{PREFIX}{progress['step']:08d}"
    temporary = final.with_name(f".{final.name}")
    if accelerator.is_main_process:
        for leftover in (temporary, final):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    # DeepSpeed saves by itself, and would write the frozen weights each time.
    accelerator.save_state(str(temporary), **({"exclude_frozen_parameters": True} if deepspeed else {}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "progress.json").write_text(json.dumps(progress, indent=1))
        os.replace(temporary, final)
        for old in checkpoints(run_dir)[:-keep]:
            delete_folder(old)
    accelerator.wait_for_everyone()
    return final


def save_trained_weights_only(accelerator):
    """Leave frozen weights out of checkpoints: a resumed run has them from where it started.

    For ranks that hold whole models; sharded ones save through their own library.
    """

    def save(models, weights, folder):
        for model in models:
            tensors = trained_state(accelerator.unwrap_model(model))
            if accelerator.is_main_process:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / TRAINED)
        weights.clear()  # accelerate saves what is left here

    def load(models, folder):
        while models:
            model, saved = accelerator.unwrap_model(models.pop()), load_file(Path(folder) / TRAINED)
            learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            if learn != saved.keys():
                names = ", ".join(sorted(learn ^ saved.keys())[:3])
                raise ValueError(f"{folder} holds other weights than those that learn, such as {names}: set overwrite")
            model.load_state_dict(saved, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def lock_run(run_dir):
    """Keep other processes from training into a folder until this one ends, however it ends.

    A launcher that is killed leaves its ranks behind, and they train on.

    Returns:
        the open file that holds the lock; None on systems and file systems without locks.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(run_dir) / "lock", "a+")
    except OSError as error:
        raise ValueError(f"cannot write to run_dir {run_dir}: {error.strerror}; set run_dir or output_dir") from error
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        file.seek(0)
        raise ValueError(f"process {file.read()} trains into {run_dir}: end it, or set another run_dir") from error
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def load_checkpoint(accelerator, path):
    """Restore what `save_checkpoint` saved into the accelerator's objects and return its `progress`."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.load_state(str(path), **({"load_module_strict": False} if deepspeed else {}))
    return json.loads((Path(path) / "progress.json").read_text())


def forget_run(run_dir):
    """Delete a run's checkpoints and log; its frame cache stays."""
    for path in checkpoints(run_dir):
        delete_folder(path)
    (Path(run_dir) / "log.jsonl").unlink(missing_ok=True)


def check_settings(path, settings):
    """Raise a `ValueError` if a checkpoint belongs to a run with other settings, naming what differs."""
    saved = json.loads((Path(path) / "progress.json").read_text())["settings"]
    current = json.loads(json.dumps(settings))
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    if names:
        changes = ", ".join(f"{name} {saved.get(name)!r} -> {current.get(name)!r}" for name in names)
        raise ValueError(f"{path} is of a run with other settings ({changes}): set overwrite, or another run_dir")
