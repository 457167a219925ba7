"""The index flavour as a source: ids, texts and relevance from its repo, media from the user's folders."""

from pathlib import Path, PurePosixPath

import datasets

from dataset_builders.uvrb.sources import Item, Media, SourceError, SourceTask, is_inside
from dataset_builders.uvrb.tasks import get_tasks
from dataset_builders.uvrb.video_files import FRAME_SUFFIXES


class IndexTask(SourceTask):
    """A dataset of the index flavour with the user's files.

    Args:
        task (`Task`): which one.
        index (`str`): folder or Hub name of the index repo.
        folder (`Path`): of the user's files, searched with all its sub-folders.
    """

    def __init__(self, task, index, folder):
        super().__init__(task)
        self.index = index
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(f"no folder {folder} with the files of {task.name}")
        self.by_name, self.by_stem = {}, {}
        for path in sorted(self.folder.rglob("*")):
            self.by_name.setdefault(path.name, path)
            self.by_stem.setdefault(path.stem, path)

    def corpus(self):
        return self._items("corpus")

    def queries(self):
        return self._items("queries")

    def positives(self):
        positives = {}
        for row in self._table("qrels"):
            positives.setdefault(row["query-id"], []).append(row["corpus-id"])
        return positives

    def candidates(self):
        if not self.task.has_candidates:
            return None
        return {row["query-id"]: row["corpus-ids"] for row in self._table("top_ranked")}

    def _table(self, part):
        name = f"{self.task.key}-{part}"
        try:
            return datasets.load_dataset(self.index, name, split="test", streaming=True)
        except Exception as error:  # datasets and the Hub client raise a dozen kinds here
            raise SourceError(f"{self.index} has no {name}: {' '.join(str(error).split())[:160]}") from error

    def _items(self, side):
        for row in self._table(side):
            parts = {}
            for kind in ("image", "video"):
                name = row[f"{kind}_file"]
                if not name:
                    continue
                path = self._find(name)
                if path is None:
                    self.report(side, row["id"], f"{name!r} is not in {self.folder.name}; the row is left out")
                    break
                drawn = kind == "image" and PurePosixPath(name).suffix.lower() not in FRAME_SUFFIXES
                parts[kind] = Media(path, name, kind, drawn, row["sha256"])
            else:
                yield Item(row["id"], row["text"], **parts)

    def _find(self, name):
        """The user's file of that name: at the same place, else anywhere, else with another ending."""
        if not is_inside(name):
            return None
        name = PurePosixPath(name)
        place = self.folder / name
        return place if place.exists() else self.by_name.get(name.name) or self.by_stem.get(name.stem)


def open_index(index, folders, keys=None):
    """Tasks of an index repo.

    Args:
        index (`str`): folder or Hub name.
        folders (`dict[str, str]`): folder of the files by dataset key; `""` for all others.
        keys (iterable of `str`, *optional*): which ones; all that have a folder by default.

    Raises:
        SourceError: a dataset without a folder, or the index is not there.
        ValueError: an unknown key.
    """
    tasks = get_tasks(keys if keys is not None or "" in folders else folders)
    bare = [task.key for task in tasks if task.key not in folders and "" not in folders]
    if bare:
        raise SourceError(f"no folder for {', '.join(bare)}; give --videos FOLDER or --videos KEY=FOLDER")
    if keys is None and "" in folders:
        try:
            present = set(datasets.get_dataset_config_names(index))
        except Exception as error:
            raise SourceError(f"no index at {index}: {' '.join(str(error).split())[:160]}") from error
        tasks = [task for task in tasks if f"{task.key}-corpus" in present]
    return [IndexTask(task, index, folders.get(task.key, folders.get(""))) for task in tasks]
