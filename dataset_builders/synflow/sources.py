"""Where videos come from: the index lists them once, in a fixed order, and cuts it into parts."""

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import numpy as np

from dataset_builders.synflow.documents import WholeWriter, new_document
from dataset_builders.synflow.recipe import RecipeError
from dataset_builders.synflow.rendered import draw_video, render_video
from dataset_builders.synflow.store import write_whole


def _list_files(source, work):
    folder = Path(source.folder).resolve()
    captions = folder / source.captions
    if not captions.is_file():
        raise RecipeError(f"source {source.id}: no file {captions}; it holds lines of {{'video': ..., 'text': ...}}")
    seen = Counter()
    with open(captions, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name, text = row["video"], row.get("text") or ""
                path = (folder / name).resolve()
                inside = path.is_relative_to(folder)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RecipeError(f"{captions}, line {number}: no object with 'video' and 'text' ({error})") from error
            if not inside:
                raise RecipeError(f"{captions}, line {number}: {name} lies outside {folder}")
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            yield {"name": unique, "text": str(text), "group": row.get("source") or name, "file": str(path)}


def _list_dataset(source, work):
    rows = datasets.load_dataset(source.repo, source.config, split=source.split, streaming=True)
    needed = [column for column in (source.video, source.text, source.source) if column]
    if missing := set(needed) - set(rows.column_names or needed):
        problem = f"{source.repo} has no column {sorted(missing)}, but {rows.column_names}"
        raise RecipeError(f"source {source.id}: {problem}")
    if isinstance((rows.features or {}).get(source.video), datasets.Video):
        rows = rows.cast_column(source.video, datasets.Video(decode=False))
    for number, row in enumerate(rows.take(source.limit) if source.limit else rows):
        name = f"{number:07d}"
        path = Path(work) / "videos" / source.id / f"{name}.mp4"
        try:
            data = None if path.exists() else _video_bytes(row[source.video])
        except OSError as error:
            problem = " ".join(str(error).split())[:160]
            raise RecipeError(
                f"source {source.id}, row {number}: cannot be read ({problem}); start the same command again: what "
                "was read is kept"
            ) from error
        if data is not None:
            write_whole(path, data)
        group = row[source.source] if source.source else None
        yield {"name": name, "text": str(row[source.text] or ""), "file": str(path), "group": group}


def _video_bytes(video):
    """Of a column of bytes or of files, which may lie on the Hub or in an archive; None where there are none."""
    if not isinstance(video, dict) or video.get("bytes") is not None:
        return video["bytes"] if isinstance(video, dict) else video
    try:
        with fsspec.open(video.get("path") or "", "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError):  # the empty path is a folder
        return None


def _list_rendered(source, work):
    for number in range(source.videos):
        yield {"name": f"{number:07d}", "number": number, "text": None}


_LISTS = {"files": _list_files, "dataset": _list_dataset, "rendered": _list_rendered}


def list_videos(recipe, work):
    """A document a video, in order."""
    index = 0
    for source in recipe.sources:
        for row in _LISTS[source.kind](source, work):
            yield _document(recipe, source, index, row)
            index += 1


def _document(recipe, source, index, row):
    if row["text"] is None:
        row["text"] = draw_video(source, recipe.seed, row["number"]).text
    return new_document(index, index // recipe.part_size, source.id, **row)


def sample_videos(recipe, work, counts, number):
    """About `number` videos at random, as many of each source as are its share.

    Of a streamed source they are the first, because all before the last one are downloaded.

    Args:
        recipe (`Recipe`): its seed draws them.
        work (`Path`): where streamed videos are written.
        counts (`dict`): videos by source, as [`count_videos`] has them.
        number (`int`): of videos.
    """
    found, rng, total = [], np.random.default_rng(recipe.seed), sum(counts.values())
    for source in recipe.sources:
        count = counts[source.id]
        size = min(count, max(1, round(number * count / total)))
        places = range(size) if source.kind == "dataset" else np.sort(rng.permutation(count)[:size])
        wanted = set(map(int, places))
        rows = islice(_LISTS[source.kind](source, work), max(wanted, default=-1) + 1)
        chosen = [row for place, row in enumerate(rows) if place in wanted]
        found += [_document(recipe, source, len(found) + k, row) for k, row in enumerate(chosen)]
    order = rng.permutation(len(found))
    return [found[k] for k in order]


def count_videos(recipe):
    """How many videos the recipe's sources hold; None for each streamed source without a limit."""
    counts = {}
    for source in recipe.sources:
        if source.kind == "rendered":
            counts[source.id] = source.videos
        elif source.kind == "dataset":
            counts[source.id] = source.limit
        else:
            counts[source.id] = sum(1 for _ in _list_files(source, None))
    return counts


def write_index(recipe, work):
    """Writes `index/<part>.jsonl` unless that was done; returns the number of parts."""
    if (begun := read_index(recipe, work)) is not None:
        return begun
    last, writer = None, WholeWriter(Path(work) / "index")
    with writer:
        for document in list_videos(recipe, work):
            last = int(document.metadata["part"])
            writer.write(document, rank=last)
    if last is None:
        raise RecipeError("the sources hold no videos")
    write_whole(_listed(work), json.dumps({"parts": last + 1, "captions": _captions_hashes(recipe)}))
    return last + 1


def read_index(recipe, work):
    """The number of parts, None where there is no index.

    Raises:
        RecipeError: a source's captions are others than when the run began.
    """
    if not _listed(work).exists():
        return None
    begun, captions = json.loads(_listed(work).read_text()), _captions_hashes(recipe)
    for name, digest in begun["captions"].items():
        if captions.get(name) != digest:
            raise RecipeError(
                f"source {name}: its captions have changed since the run began; remove {work} and the dataset to "
                "begin anew (answers are kept), or give the recipe another name"
            )
    return begun["parts"]


def _listed(work):
    return Path(work) / "index" / "listed.json"


def _captions_hashes(recipe):
    """`{source: hash}` of the captions' files, which a recipe names and does not hold."""
    files = {source.id: Path(source.folder) / source.captions for source in recipe.sources if source.kind == "files"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()}


def video_file(recipe, work, document):
    """Path of the document's video; a rendered one is rendered first."""
    metadata = document.metadata
    if metadata["number"] is None:
        return metadata["file"]
    path = Path(work) / "videos" / metadata["source"] / metadata["part"] / f"{metadata['number']:07d}.mp4"
    if not path.exists():
        write_whole(path, render_video(draw_video(source_of(recipe, document), recipe.seed, metadata["number"])))
    metadata["file"] = str(path)
    return metadata["file"]


def source_of(recipe, document):
    return next(source for source in recipe.sources if source.id == document.metadata["source"])


def film_of(recipe, document):
    """The scene graph of a rendered video."""
    return draw_video(source_of(recipe, document), recipe.seed, document.metadata["number"]).film
