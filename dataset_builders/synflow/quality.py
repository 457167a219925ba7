"""Stage 1, quality control: a filter keeps a video or names the reason why not (arXiv 2510.27571, section 4)."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
from datatrove.pipeline.filters.base_filter import BaseFilter

from dataset_builders.synflow.decontamination import BenchmarkFootage, benchmark_texts, benchmark_videos, text_overlap
from dataset_builders.synflow.embedders import cosines
from dataset_builders.synflow.footage import (
    LUMA_BYTES,
    SIGNATURE_BITS,
    FootageError,
    clip_spans,
    cut_clip,
    encode_jpeg,
    frame_times,
    look_at,
    motion,
    one_line,
    read_frames,
    shots,
    signature,
    track,
)
from dataset_builders.synflow.sources import video_file
from dataset_builders.synflow.store import write_whole
from dataset_builders.synflow.texts import normal_form, rectify, why_not_descriptive


class TextFilter(BaseFilter):
    """Rectifies captions and drops those that describe nothing."""

    name = "text"

    def __init__(self, recipe, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.settings = recipe.quality.text

    def filter(self, document):
        reason = why_not_descriptive(document.text, self.settings.min_words, self.settings.language)
        if reason is not None:
            return False, reason
        document.metadata["raw_text"] = document.text
        document.text = rectify(document.text)
        return True


class VideoPresent(BaseFilter):
    """All that raw pairs ask of a video: that there is a file."""

    name = "present"

    def __init__(self, recipe, work, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.recipe, self.work = recipe, str(work)

    def filter(self, document):
        path = Path(video_file(self.recipe, self.work, document))
        return path.is_file() or (False, "video_missing")


class VideoFilter(BaseFilter):
    """Decodes each video once: readable, within bounds, not static; notes its shots and signature."""

    name = "video"

    def __init__(self, recipe, work, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.recipe, self.work = recipe, str(work)

    def filter(self, document):
        try:
            self._inspect(document)
        except FootageError as error:
            document.metadata["detail"] = str(error)
            return False, error.reason
        return True

    def _inspect(self, document):
        limits = self.recipe.quality.video
        path = Path(video_file(self.recipe, self.work, document))
        if not path.is_file():
            raise FootageError("video_missing", f"no file {path}")
        size = path.stat().st_size
        if not 0 < size <= limits.max_bytes:
            raise FootageError("video_empty" if not size else "video_too_many_bytes", f"{size} bytes")
        footage = look_at(str(path), limits)
        moving = motion(footage)
        if moving < limits.min_motion:
            raise FootageError("video_static", f"it moves by {moving:.2f} grey levels, below {limits.min_motion:g}")
        with open(path, "rb") as file:
            content = hashlib.sha256()
            while block := file.read(1 << 20):
                content.update(block)
        document.metadata.update(
            content=content.hexdigest(),
            seconds=round(footage.seconds, 3),
            width=footage.width,
            height=footage.height,
            motion=round(moving, 2),
            shots=[(round(start, 3), round(end, 3)) for start, end in shots(footage, self.recipe.quality.cutting)],
            signature=signature(footage).tobytes().hex(),
        )
        if self.recipe.decontamination is not None:  # for [`Selection`], which takes it away again
            times, hashes = track(footage)
            document.metadata["track"] = {"times": times.round(3).tolist(), "hashes": hashes.tobytes().hex()}


class SimilarityFilter(BaseFilter):
    """Scores caption against video; drops below a set threshold (a percentile waits for all scores)."""

    name = "similarity"

    def __init__(self, recipe, exclusion_writer=None):
        super().__init__(exclusion_writer, batch_size=recipe.quality.similarity.batch_size)
        self.recipe = recipe

    def filter(self, document):
        return self.filter_batch([document])[0]

    def filter_batch(self, batch):
        threshold = self.recipe.quality.similarity.threshold
        verdicts = []
        for document, cosine in zip(batch, cosines(self.recipe, batch).tolist()):
            if not np.isfinite(cosine):
                verdicts.append((False, "video_not_embeddable"))
                continue
            document.metadata["similarity"] = round(cosine, 4)
            good = threshold is None or cosine >= threshold
            verdicts.append(good or (False, "text_does_not_match"))
        return verdicts


class Selection(BaseFilter):
    """What can be told of all videos together: the percentile of cosines, texts and videos that come again, and what
    is in the benchmark.
    """

    name = "selection"

    def __init__(self, recipe, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.recipe = recipe
        self._verdicts = {}

    def filter(self, document):
        reason = self._verdicts.get(document.id)
        return (False, reason) if reason else True

    def run(self, data, rank=0, world_size=1):
        documents = sorted(data, key=lambda document: document.metadata["index"])
        self._tracks = {document.id: document.metadata.pop("track", None) for document in documents}
        for judge in (self._percentile, self._repeated_texts, self._duplicates, self._contaminated):
            left = [document for document in documents if document.id not in self._verdicts]
            self._verdicts.update(judge(left))
        yield from super().run(iter(documents), rank, world_size)

    def _percentile(self, documents):
        settings = self.recipe.quality.similarity
        if settings is None or settings.percentile is None or not documents:
            return {}
        scores = [document.metadata["similarity"] for document in documents]
        least = np.percentile(scores, settings.percentile)
        return {d.id: "text_does_not_match" for d, score in zip(documents, scores) if score < least}

    def _repeated_texts(self, documents):
        counts = Counter(normal_form(document.text) for document in documents)
        most = self.recipe.quality.text.max_repeats
        return {d.id: "text_repeated" for d in documents if counts[normal_form(d.text)] > most}

    def _duplicates(self, documents):
        index = SignatureIndex(self.recipe.quality.duplicates)
        found = {}
        for document in documents:
            bits = read_signature(document)
            origin = index.find(bits)
            if origin is None:
                index.add(document.id, bits)
            else:
                document.metadata["detail"] = f"like {origin}"
                found[document.id] = "video_duplicate"
        return found

    def _contaminated(self, documents):
        settings = self.recipe.decontamination
        if settings is None:
            return {}
        videos, ngram_set = benchmark_videos(settings, self.recipe.quality.video), benchmark_texts(settings)
        index, footage, found = SignatureIndex(settings), BenchmarkFootage(videos, settings), {}
        for video in videos:
            index.add(video.name, video.signature)
        for document in documents:
            origin = index.find(read_signature(document))
            shared = footage.find(*read_track(self._tracks[document.id]))
            if origin is not None:
                document.metadata["detail"] = f"like {origin}"
                found[document.id] = "video_in_benchmark"
            elif shared is not None:
                document.metadata["detail"] = "shares {:.1f} s with {}".format(*shared)
                found[document.id] = "video_in_benchmark"
            elif text_overlap(document.text, ngram_set, settings.ngram) > settings.max_overlap:
                found[document.id] = "text_in_benchmark"
        return found


def read_signature(document):
    return np.frombuffer(bytes.fromhex(document.metadata["signature"]), np.uint8)


def read_track(noted):
    """Seconds `(T,)` and hashes `(T, 16)` of a document's frames."""
    return np.array(noted["times"]), np.frombuffer(bytes.fromhex(noted["hashes"]), np.uint8).reshape(-1, 16)


class SignatureIndex:
    """Near-duplicates by Hamming distance.

    Each frame's 64 bits of luma are cut into 4 bands of 16, and only videos that share a band are compared in full: up
    to 31 different bits of luma leave one of the 32 bands untouched for certain.

    Args:
        limits (`Duplicates` or `Decontamination`): in how many bits near-duplicates may differ.
    """

    def __init__(self, limits):
        self.limits = limits
        self._names, self._rows = [], []
        self._bands = defaultdict(list)

    def add(self, name, bits):
        number = len(self._names)
        self._names.append(name)
        self._rows.append(bits)
        for band in self._keys(bits):
            self._bands[band].append(number)

    def find(self, bits):
        """Name of the first that differs in few enough bits, or None."""
        candidates = sorted(set().union(*(self._bands.get(band, ()) for band in self._keys(bits))))
        if not candidates:
            return None
        rows = np.stack([self._rows[number] for number in candidates])
        distances = np.bitwise_count(rows ^ bits).reshape(len(rows), -1, SIGNATURE_BITS // 8)
        alike = distances.sum(axis=(1, 2)) <= self.limits.max_bits
        alike &= distances[:, :, :LUMA_BYTES].sum(axis=(1, 2)) <= self.limits.max_luma_bits
        near = np.flatnonzero(alike)
        return self._names[candidates[near[0]]] if len(near) else None

    def _keys(self, bits):
        bands = bits.view(np.uint16).reshape(-1, 8)[:, :4].ravel()
        # A band of nothing is shared by all pictures without that frequency: it tells nothing.
        return [place << 16 | int(band) for place, band in enumerate(bands) if band] or [-1]


class Cutter(BaseFilter):
    """Cuts the stills and clips that the formats allotted to a video need; drops a video that cannot be cut."""

    name = "cut"

    def __init__(self, recipe, work, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.recipe, self.work = recipe, Path(work)

    def filter(self, document):
        facts = document.metadata
        base = self.work / "cut" / "media" / facts["part"] / f"{facts['index']:08d}"
        try:
            facts["frames"], facts["clips"] = self._stills(facts, base), self._clips(facts, base)
        except FootageError as error:
            facts["detail"] = str(error)
            return False, error.reason
        except (av.FFmpegError, OSError) as error:
            facts["detail"] = one_line(error)
            return False, "video_not_cut"
        return True

    def _stills(self, facts, base):
        times = frame_times(facts["shots"], facts["stills"])
        stills = []
        for k, picture in enumerate(read_frames(facts["file"], times) if times else ()):
            path = base.with_name(f"{base.name}-{k}.jpg")
            write_whole(path, encode_jpeg(picture, self.recipe.quality.cutting.jpeg_quality))
            stills.append({"time": times[k], "file": str(path)})
        return stills

    def _clips(self, facts, base):
        clips, least = [], self.recipe.quality.cutting.min_shot_seconds
        for k, (start, end) in enumerate(clip_spans(facts["shots"], facts["seconds"], facts["cuts"], least)):
            path = base.with_name(f"{base.name}-{k}.mp4")
            write_whole(path, cut_clip(facts["file"], start, end))
            clips.append({"span": (start, end), "file": str(path)})
        return clips
