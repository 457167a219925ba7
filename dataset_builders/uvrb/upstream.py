"""UVRB from the upstream datasets: their own annotation files, and videos in a folder of the user's.

Layouts as their public repositories document or use them; the table in this folder's README names each file. Where
the paper's number of queries is below the number of annotations, equal texts are one query with several answers:
DREAM-1K's 6,298 events have 6,251 distinct texts, which is the published number.
"""

import csv
import hashlib
import json
from pathlib import Path, PurePosixPath

import yaml
from pyarrow import parquet

from dataset_builders.uvrb.sources import Item, Media, SourceError, SourceTask, is_inside, read_lines
from dataset_builders.uvrb.tasks import TASKS


VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".3gp", ".wmv", ".flv")


class UpstreamTask(SourceTask):
    """Texts that each describe a video; what a dataset does differently, its class overrides.

    Args:
        task (`Task`): which one.
        annotations (`Path`): the upstream's file (PE-Video: folder of files).
        folders (`dict[str, Path]`): `videos`, and for some datasets `images` or `clips`.
    """

    merges_equal_texts = False

    def __init__(self, task, annotations, folders):
        super().__init__(task)
        self.annotations = annotations
        self.folders = folders
        self._files = {}
        self._rows = None

    def pairs(self):
        """Yields `(query id, video, text or None)` an annotation; the video is a name or path of the upstream's."""
        raise NotImplementedError  # abstract

    def corpus(self):
        names = dict.fromkeys(video for _, video, _ in self._read())
        yield from filter(None, (self.video_item(name) for name in names))

    def queries(self):
        said = set()
        for query, _, text in self._read():
            if text and not (self.merges_equal_texts and text in said):
                said.add(text)
                yield Item(query, text)

    def positives(self):
        first, positives = {}, {}
        for query, video, text in self._read():
            if not text:
                continue
            name = first.setdefault(text, query) if self.merges_equal_texts else query
            positives.setdefault(name, []).append(video_id(video))
        return {name: list(dict.fromkeys(ids)) for name, ids in positives.items()}

    def video_item(self, name):
        """Corpus item of a video; `None`, and a report, if the file is missing."""
        media = self.find("videos", name)
        if media is None:
            self.report("corpus", video_id(name), f"its video {name!r} is missing; the row is left out")
            return None
        return Item(video_id(name), video=media)

    def find(self, folder, name, kind="video", **more):
        """A file by its path in a folder, else by its name anywhere in it, whatever its ending."""
        if not is_inside(name):
            return None
        place = self.folders[folder] / name
        path = place if place.is_file() else self._listing(folder).get(PurePosixPath(name).name)
        path = path or self._listing(folder).get(PurePosixPath(name).stem) or self._listing(folder).get(name)
        return path and Media(path, path.relative_to(self.folders[folder]).as_posix(), kind, **more)

    def _listing(self, folder):
        if folder not in self._files:
            self._files[folder] = {}
            for path in sorted(self.folders[folder].rglob("*")):
                if path.is_file():
                    self._files[folder].setdefault(path.name, path)
                    self._files[folder].setdefault(path.stem, path)
        return self._files[folder]

    def _read(self):
        if self._rows is None:
            self._rows = [(str(query), str(video), text) for query, video, text in self.pairs()]
        return self._rows


def video_id(name):
    """Id of a video: its path without the ending of a video file."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else str(path)


class MSRVTTTask(UpstreamTask):
    """`MSRVTT_JSFUSION_test.csv`: key, vid_key, video_id, sentence."""

    def pairs(self):
        with open(self.annotations, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield field(row, "key", self), field(row, "video_id", self), field(row, "sentence", self)


class MSRVTTFrameTask(MSRVTTTask):
    """The same videos, each asked for by a random frame of its own."""

    def queries(self):
        for name in dict.fromkeys(video for _, video, _ in self._read()):
            if frame := self.find("videos", name, "image", frame_of_video=True):
                yield Item(video_id(name), image=frame)

    def positives(self):
        return {video_id(video): [video_id(video)] for _, video, _ in self._read()}


class DiDeMoTask(UpstreamTask):
    """`test_data.json`: annotations with `video` and `description`; a video's descriptions make one paragraph."""

    def pairs(self):
        sentences = {}
        for row in read_json(self.annotations):
            sentences.setdefault(field(row, "video", self), []).append(field(row, "description", self).strip())
        for video, said in sentences.items():
            yield video_id(video), video, " ".join(said)


class CaReBenchTask(UpstreamTask):
    """`metadata.json`: `video`, `caption`, `spatial_caption`, `temporal_caption`."""

    def pairs(self):
        for row in read_json(self.annotations):
            video = field(row, "video", self)
            yield video_id(video), video, row.get(self.task.query_field)


class VDCTask(UpstreamTask):
    """`VDC_1k.jsonl`: `video_name` and a caption an aspect."""

    def pairs(self):
        for row in read_lines(self.annotations):
            video = field(row, "video_name", self)
            yield video_id(video), video, row.get(self.task.query_field)


class CameraBenchTask(UpstreamTask):
    """`test.jsonl`: `path` and `caption`; equal captions are one query."""

    merges_equal_texts = True

    def pairs(self):
        for row in read_lines(self.annotations):
            video = field(row, "path", self)
            yield video_id(video), video, row.get("caption")


class DREAMTask(UpstreamTask):
    """`DREAM-1k.jsonl`: `vid` (older copies: `idx`) and `extra_info.events`; equal events are one query."""

    merges_equal_texts = True

    def pairs(self):
        for row in read_lines(self.annotations):
            video = row["vid"] if "vid" in row else field(row, "idx", self)
            for number, event in enumerate(row.get("extra_info", {}).get("events", [])):
                yield f"{video}-{number}", video, event.strip()


class LoVRThemeTask(UpstreamTask):
    """Clip themes (JSONL or Parquet): `vid` or `path` of the clip, and `cap`."""

    def pairs(self):
        for row in read_table(self.annotations):
            video = row.get("vid") or field(row, "path", self)
            yield video_id(PurePosixPath(video).name), PurePosixPath(video).name, row.get("cap")


class LoVRVideoTask(LoVRThemeTask):
    """Captions of full videos, of which few are annotated: the corpus is every file of the folder."""

    def corpus(self):
        files = sorted(self.folders["videos"].rglob("*"))
        for path in files:
            if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
                yield self.video_item(path.name)


class LoVRClipTask(LoVRVideoTask):
    """Each full video asked for by one of its clips, `clips/<video>/<video>-Scene-001.mp4`; needs no captions."""

    def pairs(self):
        for item in self.corpus():
            yield item.id, item.id, None

    def queries(self):
        for _, video, _ in self._read():
            clips = [path for path in sorted((self.folders["clips"] / video).glob("*")) if path.is_file()]
            if not clips:
                self.report("queries", video, "it has no clips; the row is left out")
                continue
            # Not in the paper: which clip; drawn by the video's name, so that every build has the same.
            draw = int.from_bytes(hashlib.sha256(f"uvrb clip {video}".encode()).digest()[:8], "big")
            clip = clips[draw % len(clips)]
            yield Item(video, video=Media(clip, clip.relative_to(self.folders["clips"]).as_posix(), "video"))

    def positives(self):
        return {video: [video] for _, video, _ in self._read()}


class PEVideoTask(UpstreamTask):
    """The test set unpacked: `<id>.mp4` beside `<id>.json` with `keywords` (a list or one string)."""

    merges_equal_texts = True

    def pairs(self):
        if not self.annotations.is_dir():
            raise SourceError(f"pev_k: {self.annotations} is no folder of <id>.json files; unpack the test set there")
        for path in sorted(self.annotations.rglob("*.json")):
            keywords = read_json(path, dict).get("keywords")
            text = ", ".join(map(str, keywords)) if isinstance(keywords, list) else keywords
            yield path.stem, path.stem, text


class MomentSeekerTask(UpstreamTask):
    """Rows as VLM2Vec-V2 adapted them: `query`, `input_frames`, `positive_frames`, `negative_frames`.

    `input_frames` ends in `.jpg` for an image query (the file in `images` carries the prefix `query_`), in `.mp4` for
    a clip query; rows of the other kind are another dataset's.
    """

    def rows(self):
        ending = ".jpg" if self.task.query_modality == "text+image" else ".mp4"
        for number, row in enumerate(read_table(self.annotations)):
            if str(row.get("input_frames") or "").endswith(ending):
                yield f"{self.task.key}-{number:04d}", row

    def pairs(self):
        for query, row in self.rows():
            for clip in [*row["positive_frames"], *row["negative_frames"]]:
                yield query, clip["output_path"], row["query"]

    def queries(self):
        for query, row in self.rows():
            name = row["input_frames"]
            is_image = name.endswith(".jpg")
            media = (
                self.find("images", f"query_{name}", "image") or self.find("images", name, "image")
                if is_image
                else self.find("clips" if "clips" in self.folders else "videos", name)
            )
            if media is None:
                self.report("queries", query, f"its {'image' if is_image else 'clip'} {name!r} is missing")
                continue
            yield Item(query, row["query"], **{media.kind: media})

    def positives(self):
        return {
            query: [video_id(clip["output_path"]) for clip in row["positive_frames"]] for query, row in self.rows()
        }

    def candidates(self):
        lists = {}
        for query, clip, _ in self._read():
            lists.setdefault(query, []).append(video_id(clip))
        return {query: list(dict.fromkeys(ids)) for query, ids in lists.items()}


UPSTREAM_CLASSES = {
    "msrvtt": MSRVTTTask,
    "didemo": DiDeMoTask,
    "crb_g": CaReBenchTask,
    "crb_s": CaReBenchTask,
    "vdc_o": VDCTask,
    "crb_t": CaReBenchTask,
    "cmrb": CameraBenchTask,
    "dream_e": DREAMTask,
    "lovr_th": LoVRThemeTask,
    "pev_k": PEVideoTask,
    "lovr_v": LoVRVideoTask,
    "vdc_d": VDCTask,
    "ms_ti": MomentSeekerTask,
    "ms_tv": MomentSeekerTask,
    "msrvtt_i2v": MSRVTTFrameTask,
    "lovr_c2v": LoVRClipTask,
}
NEEDS = {"ms_ti": ("images", "videos"), "lovr_c2v": ("clips", "videos")}


def open_upstream(path, keys=None):
    """Tasks of a YAML file `key: {annotations: FILE, videos: FOLDER, images: FOLDER, clips: FOLDER}`.

    Relative paths count from the file's own folder.

    Args:
        path (`str` or `Path`): the file.
        keys (iterable of `str`, *optional*): which ones; all that it names by default.

    Raises:
        SourceError: the file, an entry or a folder is missing or not what it should be.
    """
    path = Path(path)
    try:
        places = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SourceError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    unknown = [key for key in (places if isinstance(places, dict) else {"no mapping": 0}) if key not in TASKS]
    if unknown:
        raise SourceError(f"{path} names {unknown[0]!r}; choose from {', '.join(TASKS)}")
    absent = [key for key in keys or () if key not in places]
    if absent:
        raise SourceError(f"{path} lacks {', '.join(absent)}")
    return [_open_task(key, places[key], path) for key in TASKS if key in places and (keys is None or key in keys)]


def _open_task(key, entry, path):
    wanted = (*NEEDS.get(key, ("videos",)), *(() if key == "lovr_c2v" else ("annotations",)))
    missing = [name for name in wanted if not (isinstance(entry, dict) and entry.get(name))]
    if missing:
        raise SourceError(f"{path}: {key} needs {', '.join(missing)}")
    places = {name: path.parent / place for name, place in entry.items()}
    for name, place in places.items():
        if not place.exists() or (name != "annotations" and not place.is_dir()):
            raise SourceError(f"{path}: {key}: no {name} at {place}")
    return UPSTREAM_CLASSES[key](TASKS[key], places.pop("annotations", None), places)


def field(row, name, task):
    """A column that every row must have.

    Raises:
        SourceError: it has not; the message names the columns that it has.
    """
    if row.get(name) in (None, ""):
        raise SourceError(f"{task.annotations} has a row without {name!r}; it has {', '.join(map(str, row))}")
    return row[name]


def read_json(path, kind=list):
    """A JSON file.

    Raises:
        SourceError: missing, or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    if not isinstance(content, kind):
        raise SourceError(f"{path} holds no JSON {'list' if kind is list else 'object'}")
    return content


def read_table(path):
    """Rows of a JSONL, JSON or Parquet file."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return read_json(path) if path.suffix == ".json" else read_lines(path)
