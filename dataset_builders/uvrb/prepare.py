"""From the media of a source to files that are known to be sound, with a record of each, kept between runs.

Each file is done once, on all cores, and its record is written last: whoever is killed goes on with the next file.
"""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset_builders.hub_layout import file_hash, write_whole
from dataset_builders.mini.render import encode_png
from dataset_builders.uvrb import video_files
from dataset_builders.uvrb.duplicates import frame_hashes
from modeling_gve.video_gve import load_image


VERSION = 2  # of the records: a change of what is stored makes old ones invalid
N_DRAWN = 64  # an image query is drawn from as many uniform frames of its video
RANDOM_FRAME_SEED = "uvrb frame"


@dataclass
class Prepared:
    """What became of one file of a source.

    Attributes:
        name (`str`): its path in the source.
        action (`str`): `"none"`, `"remux"`, `"re-encode"`, `"join frames"`, `"draw frame"` or `"broken"`.
        reasons (list of `str`): why it was touched or given up.
        facts (`dict`): container, codec, width, height, n_frames, duration_s.
        sha256 (`str`): of the source's file; empty for a folder of frames.
        hashes (list of `str`): perceptual hash of each of its uniform frames.
        file (`str`): the sound file.
        clip (`str`): the 8-frame video; empty for an image, or where none was asked for.
        file_sha256, clip_sha256 (`str`): their hashes.
    """

    name: str
    action: str
    reasons: list[str]
    facts: dict
    sha256: str
    hashes: list[str]
    file: str
    file_sha256: str = ""
    clip: str = ""
    clip_sha256: str = ""

    @property
    def is_broken(self):
        return self.action == "broken"


def prepare_all(media, cache, clips=True, processes=1):
    """Makes or looks up the record of every file.

    Args:
        media (iterable of `Media`): what the datasets need; repeats are done once.
        cache (`Path`): where mended files, clips and records are kept.
        clips (`bool`): whether 8-frame videos are wanted.
        processes (`int`): at the same time.

    Returns:
        `dict[Media, Prepared]`
    """
    media = list(dict.fromkeys(media))
    work = partial(prepare, cache=cache, clips=clips)
    bar = partial(tqdm, total=len(media), desc="preparing videos", unit="file")
    if processes == 1:
        return dict(zip(media, bar(map(work, media))))
    with ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        return dict(zip(media, bar(pool.map(work, media, chunksize=4))))


def prepare(part, cache, clips=True):
    """The record of one file, read from the cache or made now; never raises for what the file holds."""
    stem = cache / _key(part)
    record = stem.with_suffix(".json")
    if (done := _read(record)) and (done.clip or done.is_broken or part.kind == "image" or not clips):
        return done
    if part.kind == "image":
        made = _prepare_image(part, stem)
    else:
        made = _prepare_video(part, stem, clips)
    made.file_sha256 = file_hash(made.file) if not made.is_broken else ""
    made.clip_sha256 = file_hash(made.clip) if made.clip else ""
    write_whole(record, json.dumps(asdict(made), sort_keys=True).encode())
    return made


def _prepare_video(part, stem, clips):
    is_folder = part.path.is_dir()
    found = video_files.read_folder(part.path) if is_folder else video_files.inspect(part.path)
    action, reasons, file = "none", found.problems, part.path
    if is_folder and not found.problems:
        action, reasons = "join frames", [f"it is a folder of {found.n_listed} frames"]
        file = _keep(stem, ".mp4", video_files.encode_folder(part.path))
    elif is_folder:
        action = "broken"
    elif found.problems:
        action, content, found = video_files.repair(part.path, found)
        if content is not None:
            file = _keep(stem, ".mp4", content)
    made = Prepared(part.name, action, list(reasons), found.facts, _hash(part), [], str(file))
    if found.frames is not None and not made.is_broken:
        made.hashes = frame_hashes(found.frames)
        if clips:
            made.clip = str(_keep(stem, ".clip.mp4", video_files.encode_clip(found)))
    return made


def _prepare_image(part, stem):
    made = Prepared(part.name, "none", [], {}, _hash(part), [], str(part.path))
    try:
        if part.frame_of_video:
            pixels = _random_frame(part)
            made.action, made.reasons = "draw frame", ["the query is a random frame of this video"]
            made.file = str(_keep(stem, ".png", encode_png(pixels)))
        else:
            pixels = load_image(str(part.path))
    except (ValueError, OSError) as error:
        made.action, made.reasons = "broken", [" ".join(str(error).split())[:160]]
        return made
    made.facts = {"width": pixels.shape[1], "height": pixels.shape[0]}
    made.hashes = frame_hashes(pixels[None])
    return made


def _random_frame(part):
    found = video_files.inspect(part.path, N_DRAWN)
    if found.frames is None:
        raise ValueError("; ".join(found.problems))
    seed = hashlib.sha256(f"{RANDOM_FRAME_SEED} {part.name}".encode()).digest()
    return found.frames[np.random.default_rng(list(seed)).integers(len(found.frames))]


def _keep(stem, suffix, content):
    path = stem.with_suffix(suffix)
    write_whole(path, content)
    return path


def _hash(part):
    return "" if part.path.is_dir() else file_hash(part.path)


def _key(part):
    """Name of the record: changes with the file and with every setting that its product depends on."""
    files = sorted(part.path.iterdir()) if part.path.is_dir() else [part.path]
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    clips = (video_files.CLIP_QUALITIES, video_files.CLIP_BYTES, video_files.MAX_PIXELS)
    settings = (VERSION, clips, part.kind, part.frame_of_video)
    return hashlib.sha256(repr((str(part.path.resolve()), part.name, state, settings)).encode()).hexdigest()[:32]


def _read(record):
    if not record.is_file():
        return None
    made = Prepared(**json.loads(record.read_text(encoding="utf-8")))
    return made if made.is_broken or all(Path(path).is_file() for path in (made.file, made.clip) if path) else None


def _start_worker(parent):
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent):
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
