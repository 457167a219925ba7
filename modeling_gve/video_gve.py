# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Reading videos: a fixed number of uniformly spaced frames and the times at which they are really shown."""

import io
import logging
import os
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps


try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # its errors are raised; printed, they would come twice
except ImportError:  # no wheel for every platform
    decord = None

try:
    import av
except ImportError:
    av = None


# Not in the paper: the clock of frames that come without one. It is the rate at which Qwen2.5-VL samples videos.
DEFAULT_FRAMES_PER_SECOND = 2.0

logger = logging.getLogger(__name__)


class VideoError(ValueError):
    """A video that cannot be read. The message is one line: which video, and why."""


class VideoFrames(NamedTuple):
    """Decoded frames of a video and their clock.

    Anything with these two attributes passes for one: code loaded from the Hub has a class of its own.

    Attributes:
        frames (`np.ndarray` of shape `(T, H, W, 3)`): uint8 RGB.
        times (`np.ndarray` of shape `(T,)`): presentation times in seconds, never decreasing.
    """

    frames: np.ndarray
    times: np.ndarray


def uniform_indices(num_available: int, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` uniformly spaced frames, first and last included; a shorter clip repeats frames."""
    return np.linspace(0, num_available - 1, num_frames).round().astype(np.int64)


def mean_spacing(times) -> float:
    """Mean distance of consecutive frames in seconds; 0.0 for a single frame."""
    return float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def load_video(source, num_frames: int = 8, fps: float | None = None, times=None) -> VideoFrames:
    """Exactly `num_frames` uniform frames of a video in any accepted form.

    Args:
        source: an encoded video (path, bytes, binary file, datasets' `{"bytes", "path"}`), an opened torchcodec
            decoder, a [`VideoFrames`], an array `(T, H, W, 3)` or a list of frames in any form of [`load_image`].
        num_frames (`int`): frames to return.
        fps (`float`, *optional*): frames a second of a bare array or list.
        times (sequence of `float`, *optional*): their presentation times in seconds, instead of `fps`.

    Raises:
        VideoError: missing, empty or broken, or a clock that does not fit the frames.
    """
    if hasattr(source, "frames") and hasattr(source, "times"):
        _refuse_clock(source, fps, times)
        return sample_frames(source.frames, num_frames, times=source.times)
    if hasattr(source, "get_frames_at"):  # what datasets.Video decodes to
        _refuse_clock(source, fps, times)
        return _sample_decoder(source, num_frames)
    if isinstance(source, (list, tuple)) or hasattr(source, "shape"):
        return sample_frames(source, num_frames, fps=fps, times=times)
    _refuse_clock(source, fps, times)
    return decode_video(source, num_frames)


def decode_video(source, num_frames: int = 8) -> VideoFrames:
    """Decode exactly `num_frames` uniform frames of an encoded video, with decord or else PyAV.

    A file that is damaged in its middle may still decode, with damaged frames: decord does not tell.

    Args:
        source (`str`, `os.PathLike`, `bytes`, binary file or `dict`): the video; a dict has `bytes` or `path`.
        num_frames (`int`): frames to return.

    Returns:
        `VideoFrames`: `num_frames` frames, repeated where the clip has fewer.

    Raises:
        VideoError: the video is missing, empty or not readable.
    """
    name, data = _open(source)
    reasons = [] if _DECODERS else ["neither decord nor PyAV is installed: pip install av"]
    for decode in _DECODERS:
        try:
            return decode(data, num_frames)
        except Exception as error:  # both libraries raise classes of their own, decord some without a common base
            reasons.append(f"{decode.__name__.removeprefix('_with_')}: {_one_line(error)}")
    raise VideoError(f"{name}: not a readable video ({'; '.join(reasons)})")


def sample_frames(frames, num_frames: int, fps: float | None = None, times=None) -> VideoFrames:
    """Exactly `num_frames` uniform frames of an array or a list; frames that are not chosen are never loaded.

    Args:
        frames (array of shape `(T, H, W, 3)` or list): uint8 RGB frames, or images in any form of [`load_image`].
        num_frames (`int`): frames to return.
        fps (`float`, *optional*): frames a second.
        times (sequence of `float`, *optional*): presentation times in seconds, instead of `fps`.

    Raises:
        VideoError: no frames, frames of unequal size or another type, or an unusable clock.
    """
    if len(frames) == 0:
        raise VideoError("list of frames: it is empty")
    times = _clock(len(frames), fps, times)
    chosen = uniform_indices(len(frames), num_frames)
    if hasattr(frames, "shape"):
        if len(chosen) != len(frames) or (chosen != np.arange(len(frames))).any():
            frames = frames[chosen]
        return VideoFrames(_rgb_frames(np.asarray(frames)), times[chosen])
    try:
        loaded = {index: load_image(frames[index]) for index in dict.fromkeys(chosen.tolist())}
    except ValueError as error:
        raise VideoError(f"list of frames: {error}") from error
    if len({frame.shape for frame in loaded.values()}) > 1:
        raise VideoError(f"list of frames: sizes differ, {sorted({frame.shape[:2] for frame in loaded.values()})}")
    return VideoFrames(np.stack([loaded[index] for index in chosen.tolist()]), times[chosen])


def load_image(source) -> np.ndarray:
    """An image as uint8 RGB of shape `(H, W, 3)`.

    Args:
        source: PIL image, path, bytes, binary file, datasets' `{"bytes", "path"}`, or uint8 array of shape `(H, W, 3)`
            or `(H, W)`.

    Raises:
        ValueError: missing, empty, broken, or an array of another shape or type.
    """
    if isinstance(source, Image.Image):
        return _rgb_image(source)
    if hasattr(source, "shape"):
        array = np.asarray(source)
        if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3)):
            raise ValueError(f"image of shape {array.shape} and type {array.dtype}: use uint8 of shape (H, W, 3)")
        return np.ascontiguousarray(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))
    name, data = _open(source, kind="image", error=ValueError)
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return _rgb_image(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = _one_line(error) if isinstance(data, str) else "unknown format or damaged"
        raise ValueError(f"{name}: not a readable image ({reason})") from error


def _rgb_image(image):
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _rgb_frames(frames):
    if frames.ndim == 4 and frames.shape[3] != 3 and frames.shape[1] == 3:  # channels first, as torch has them
        frames = frames.transpose(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise VideoError(f"frames of shape {frames.shape} and type {frames.dtype}: use uint8 of shape (T, H, W, 3)")
    return frames


def _clock(count, fps, times):
    if fps is not None and times is not None:
        raise VideoError("frames came with both fps and times: give one of them")
    if times is not None:
        times = np.asarray(times, dtype=np.float64).reshape(-1)
        if len(times) != count or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise VideoError(f"{count} frames came with {len(times)} times: give one a frame, in seconds, in order")
        return times
    if fps is None:
        fps = DEFAULT_FRAMES_PER_SECOND
        _warn_once(f"frames came without `fps` or `times`: {fps:g} frames a second are assumed")
    if not 0 < fps < float("inf"):
        raise VideoError(f"frames came with fps={fps}: use a positive number")
    return np.arange(count) / fps


def _refuse_clock(source, fps, times):
    if fps is not None or times is not None:
        raise VideoError(f"{type(source).__name__} has its own clock: give fps or times with bare frames only")


@cache
def _warn_once(message):
    logger.warning(message)


def _open(source, kind="video", error=VideoError):
    """Name and data (a path or bytes) of an encoded file, checked to exist and not to be empty."""
    name = f"{kind} bytes"
    if isinstance(source, dict):
        name = source.get("path") or name
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if hasattr(source, "read"):
        name = str(getattr(source, "name", f"{kind} file"))
        if source.seekable():  # a file that was just written, or read before, stands at its end
            source.seek(0)
        source = source.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise error(f"{name}: is empty")
        return name, bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise error(f"{kind} of type {type(source).__name__}: use a path, bytes, a binary file or decoded pixels")
    path = os.fspath(source)
    if not os.path.isfile(path):
        raise error(f"{path}: no such {kind} file")
    if not os.path.getsize(path):
        raise error(f"{path}: is empty")
    return path, path


def _sample_decoder(decoder, num_frames):
    try:
        chosen = uniform_indices(_at_least_one(decoder.metadata.num_frames), num_frames)
        batch = decoder.get_frames_at(chosen.tolist())
    except Exception as error:  # torchcodec raises RuntimeError, and more
        raise VideoError(f"opened video: not readable ({_one_line(error)})") from error
    return VideoFrames(_rgb_frames(np.asarray(batch.data)), np.asarray(batch.pts_seconds, dtype=np.float64))


def _with_decord(data, num_frames):
    reader = decord.VideoReader(io.BytesIO(data) if isinstance(data, bytes) else data)
    chosen = uniform_indices(_at_least_one(len(reader)), num_frames)
    unique, places = np.unique(chosen, return_inverse=True)
    times = reader.get_frame_timestamp(unique)[:, 0].astype(np.float64)
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():  # containers without usable stamps
        times = unique / reader.get_avg_fps()
    frames = reader.get_batch(unique)
    frames = frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)  # another bridge may be set
    return VideoFrames(_rgb_frames(frames)[places], times[places])


def _with_pyav(data, num_frames):
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        stream = _video_stream(container)
        packets = container.demux(stream)
        stamps = sorted({packet.pts for packet in packets if packet.pts is not None and not packet.is_discard})
    chosen = uniform_indices(_at_least_one(len(stamps)), num_frames)
    wanted = [stamps[index] for index in chosen]
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        found = _decode_stamps(container.decode(stream), set(wanted))
        time_base = float(stream.time_base)
    if missing := set(wanted) - set(found):
        raise VideoError(f"{len(missing)} of {num_frames} frames cannot be decoded")
    return VideoFrames(
        _rgb_frames(np.stack([found[stamp] for stamp in wanted])), np.array(wanted, dtype=np.float64) * time_base
    )


def _decode_stamps(frames, wanted):
    found = {}
    for frame in frames:
        if frame.pts in wanted:
            found[frame.pts] = frame.to_ndarray(format="rgb24")
            if len(found) == len(wanted):
                break
    return found


def _video_stream(container):
    if not container.streams.video:
        raise VideoError("it has no video stream")
    return container.streams.video[0]


def _at_least_one(count):
    if count < 1:
        raise VideoError("it has no frames")
    return count


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


_DECODERS = [decode for decode, library in ((_with_decord, decord), (_with_pyav, av)) if library is not None]
