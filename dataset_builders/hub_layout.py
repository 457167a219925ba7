"""How dataset repos of this project lie on disk: features of the tables, Parquet files named by content, the YAML.

Whatever builds a repo writes through here, so that all of them load alike.
"""

import hashlib
import os
import shutil
from pathlib import Path

import datasets
import yaml

from dataset_builders.uvrb.tasks import abilities


MEDIA = {"image": datasets.Image(), "video": datasets.Video()}
SIDE = {"text": datasets.Value("string"), **MEDIA}
ROW = {"id": datasets.Value("string"), **SIDE}
# The tables of a benchmark, by the last part of a config's name.
TABLES = {
    "corpus": datasets.Features(ROW),
    "queries": datasets.Features(ROW),
    "qrels": datasets.Features(
        {
            "query-id": datasets.Value("string"),
            "corpus-id": datasets.Value("string"),
            "score": datasets.Value("int64"),
        }
    ),
    "top_ranked": datasets.Features(
        {"query-id": datasets.Value("string"), "corpus-ids": datasets.List(datasets.Value("string"))}
    ),
    "default": datasets.Features(
        {
            "id": datasets.Value("string"),
            "dataset": datasets.Value("string"),
            **SIDE,
            "instruction": datasets.Value("string"),
            "abilities": datasets.List(datasets.Value("string")),
            "relevant_ids": datasets.List(datasets.Value("string")),
            "candidate_ids": datasets.List(datasets.Value("string")),
        }
    ),
}


def default_row(task, row, relevant, candidates):
    """A query's row of the default config, from its row of `<key>-queries`."""
    return {
        "id": row["id"],
        "dataset": task.key,
        **{name: value for name, value in row.items() if name != "id"},
        "instruction": task.instruction,
        "abilities": list(abilities(task)),
        "relevant_ids": relevant,
        "candidate_ids": candidates or [],
    }


def write_table(builder_class, name, folder, cache_dir, shard=None, **settings):
    """One table, or one shard of it, as `folder/<name>/<split>[-<shard>]-<hash>.parquet`.

    The hash of the content stands in the name, and so in the card, because `load_dataset` takes a local repo whose
    card has not changed for the one that it has in its cache. A file appears whole or not at all.

    Args:
        builder_class (subclass of `datasets.GeneratorBasedBuilder`): its config `name` is the table.
        name (`str`): of the table.
        folder (`Path`): `data` of the repo.
        cache_dir (`str`): scratch space on the same file system.
        shard (`int`, *optional*): number of the shard, where the caller cuts the table.
        settings: fields of the builder's config.

    Returns:
        `dict[str, str]`: path in the repo by split.
    """
    builder = builder_class(config_name=name, cache_dir=cache_dir, **settings)
    raw = Path(cache_dir) / "parquet" / (name if shard is None else f"{name}-{shard}")
    builder.download_and_prepare(str(raw), file_format="parquet", max_shard_size="1TB")
    (folder / name).mkdir(parents=True, exist_ok=True)
    paths = {}
    for file in sorted(raw.glob("*.parquet")):
        split = file.name.partition("-")[2].partition(".")[0]
        stem = split if shard is None else f"{split}-{shard:05d}"
        digest = file_hash(file)[:12]
        paths[split] = f"data/{name}/{stem}-{digest}.parquet"
        shutil.move(file, folder / name / f"{stem}-{digest}.parquet")
    return paths


def write_card(folder, configs, license="apache-2.0"):
    """A README whose YAML lets `load_dataset` find the tables; `hub_cards` adds the prose.

    Args:
        folder (`Path`): of the repo.
        configs (list of `dict`): `config_name`, `data_files`, one with `default: true`.
        license (`str`): as the Hub writes it.
    """
    front = yaml.safe_dump({"license": license, "configs": configs}, sort_keys=False)
    write_whole(folder / "README.md", f"---\n{front}---\n".encode())


def write_whole(path, content):
    """Writes bytes to a file that appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def file_hash(path):
    """SHA-256 of a file as hex digits, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
