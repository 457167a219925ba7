"""Repos whose pairs name their pictures and videos by path: each lies once, in the config `media`."""

from functools import lru_cache

import datasets


MEDIA_CONFIG = "media"


class MediaIndex:
    """Media of such a repo, by path; they stay on disk, in the memory-mapped cache of `datasets`.

    Args:
        repo (`str`): folder or Hub name.
    """

    def __init__(self, repo):
        self._table = datasets.load_dataset(repo, MEDIA_CONFIG, split="train")
        self._places = {path: number for number, path in enumerate(self._table.data.column("path").to_pylist())}

    def __getitem__(self, path):
        if path not in self._places:
            raise ValueError(f"{path}: no such medium in this dataset's config `{MEDIA_CONFIG}`")
        return self._table[self._places[path]]["data"]

    def fill(self, row):
        """The row of pairs with the bytes of its pictures and videos."""
        row = {
            name: self._filled(value) if name.endswith(("_image", "_video")) else value for name, value in row.items()
        }
        row["negatives"] = [
            {name: value if name == "text" else self._filled(value) for name, value in side.items()}
            for side in row["negatives"] or ()
        ]
        return row

    def _filled(self, medium):
        return medium and {"bytes": self[medium["path"]], "path": medium["path"]}


@lru_cache(maxsize=1)
def _index_of(repo):
    return MediaIndex(repo) if MEDIA_CONFIG in datasets.get_dataset_config_names(repo) else None


def fill_media(repo, rows):
    """Rows of a repo's pairs with the bytes of their media, wherever the repo keeps them."""
    index = _index_of(repo)
    return rows if index is None else [index.fill(row) for row in rows]
