"""Lays the files beside a GVE model that make `SentenceTransformer(path, trust_remote_code=True)` load it."""

import json
import os
import shutil
from pathlib import Path


CODE = "sentence_transformers_gve.py"
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_gve.GVETransformer"}]
SETTINGS = {
    "model_type": "SentenceTransformer",
    "requirements": {"sentence_transformers": ">=6"},
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}


def write_sentence_transformers_files(folder, config) -> None:
    """Write `modules.json`, `config_sentence_transformers.json` and the code that they name.

    The other code files come with the model's own `save_pretrained`.

    Args:
        folder (`str` or `os.PathLike`): of the model repo.
        config (`GVEConfig`): the model's.

    Raises:
        ValueError: the model is no GVE model.
    """
    if config.model_type != "gve":
        raise ValueError(f"{folder}: holds a model of type {config.model_type!r}: convert it to a GVE repo first")
    folder = Path(folder)
    _write_whole(folder / "modules.json", lambda path: path.write_text(json.dumps(MODULES, indent=2) + "\n"))
    settings = json.dumps(SETTINGS, indent=2) + "\n"
    _write_whole(folder / "config_sentence_transformers.json", lambda path: path.write_text(settings))
    _write_whole(folder / CODE, lambda path: shutil.copyfile(Path(__file__).with_name(CODE), path))


def _write_whole(path, write):
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
