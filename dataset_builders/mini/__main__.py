"""Writes the rendered world as Hub repos.

```bash
python -m dataset_builders.mini                 # build/hub/org/uvrb-mini and build/hub/org/uvrd-mini
python -m dataset_builders.mini uvrd --scale 3  # three times the training pairs
```

A repo that was made with the same settings is kept; one that was not finished is made again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import datasets
from tqdm import tqdm

from dataset_builders.hub_layout import write_card, write_table
from dataset_builders.mini.benchmark import CORPORA, CORPUS_OF
from dataset_builders.mini.builders import MiniPairs, MiniUVRB, benchmark_tables
from dataset_builders.mini.pairs import N_PAIRS


FORMATS = ("t2t", "t2i", "t2v", "ti2v", "tv2v", "i2v", "v2v")  # mini-UVRD; the others are the collected pairs
SETTINGS = "mini.json"


def benchmark_files():
    """Tables to write, and for each config the table that serves it: datasets that share a corpus share one file."""
    serves = {}
    for name in benchmark_tables():
        key, _, table = name.rpartition("-")
        serves[name] = f"{CORPORA[CORPUS_OF[key]][0]}-corpus" if table == "corpus" else name
    return list(dict.fromkeys(serves.values())), serves


def build_uvrb(folder, cache_dir, seed, scale):
    tables, serves = benchmark_files()
    paths = {
        name: write_table(MiniUVRB, name, folder / "data", cache_dir, seed=seed)
        for name in tqdm(tables, desc="uvrb-mini", unit="table")
    }
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": paths[table]["test"]}]}
        for name, table in serves.items()
    ]
    configs[0]["default"] = True
    write_card(folder, configs)


def build_uvrd(folder, cache_dir, seed, scale):
    paths = {
        name: write_table(MiniPairs, name, folder / "data", cache_dir, seed=seed, scale=scale)
        for name in tqdm(N_PAIRS, desc="uvrd-mini", unit="table")
    }
    groups = {"all": FORMATS, **{name: (name,) for name in N_PAIRS}}
    configs = [
        {
            "config_name": name,
            "data_files": [
                {"split": split, "path": [paths[table][split] for table in tables]}
                for split in ("train", "validation")
            ],
        }
        for name, tables in groups.items()
    ]
    configs[0]["default"] = True
    write_card(folder, configs)


REPOS = {"uvrb": ("uvrb-mini", build_uvrb), "uvrd": ("uvrd-mini", build_uvrd)}


def build(which, root, seed, scale):
    """Writes one repo whole: into a temporary folder that is renamed at the end."""
    name, write = REPOS[which]
    folder = Path(root) / name
    settings = {"seed": seed, "scale": scale}
    if (folder / SETTINGS).exists() and json.loads((folder / SETTINGS).read_text()) == settings:
        print(f"{folder} is there already (seed {seed}, scale {scale})")
        return
    temporary = Path(root) / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as cache_dir:
        write(temporary, cache_dir, seed, scale)
    (temporary / SETTINGS).write_text(json.dumps(settings))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    print(f"wrote {folder}")


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m dataset_builders.mini", description=__doc__.partition("\n")[0])
    parser.add_argument("which", nargs="*", choices=[*REPOS, []], help="uvrb, uvrd or both (default)")
    parser.add_argument("--root", default="build/hub/org", help="folder of the namespace (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the training pairs (default: 1)")
    arguments = parser.parse_args(words)
    if arguments.scale <= 0:
        parser.error(f"--scale {arguments.scale}: give a number above 0")
    datasets.disable_progress_bars()
    for which in arguments.which or REPOS:
        build(which, arguments.root, arguments.seed, arguments.scale if which == "uvrd" else 1.0)


if __name__ == "__main__":
    sys.exit(main())
