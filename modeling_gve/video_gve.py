# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Reading videos: a fixed number of uniformly spaced frames and the times at which they are really shown."""

import bisect
import io
import itertools
import logging
import numbers
import os
import stat
import struct
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # its errors are raised; printed, they would come twice
except (ImportError, OSError):  # no wheel for every platform
    decord = None

try:
    import av
except ImportError:
    av = None

# From version 17 on PyAV converts a frame with a thread a core, and starting those takes longer than a small frame.
_ONE_THREAD = {"threads": 1} if av is not None and int(av.__version__.split(".")[0]) >= 17 else {}

# Not in the paper: the clock of frames that come without one. It is the rate at which Qwen2.5-VL samples videos.
DEFAULT_FRAMES_PER_SECOND = 2.0
# Not in the paper: no sound film has more frames than this rate gives over the longest duration allowed.
_MOST_FRAMES_PER_SECOND = 120
# Files that hold their pictures themselves. Playlists and the like could make FFmpeg open other files, or a network.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,asf_o,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,mxf,"
    "nut,rm,dv,gxf,wtv,swf,h261,h263,vc1,vvc,yuv4mpegpipe,mjpeg,gif,apng,webp,jpegxl_anim,png_pipe,jpeg_pipe,bmp_pipe,"
    "tiff_pipe,webp_pipe,gif_pipe,wav,w64,aiff,mp3,aac,flac,ac3,amr,au,caf,ape"
)

logger = logging.getLogger(__name__)


class VideoError(ValueError):
    """A video that cannot be read. The message is one line: which video, and why."""


class MediaLimits(NamedTuple):
    """What a medium may cost at most; beyond, it is refused before it is decoded.

    Attributes:
        max_pixels (`int`): width times height of a frame or an image.
        max_seconds (`float`): duration of a video.
        max_bytes (`int`): size of an encoded file.
    """

    # Not in the paper: twice the pixels of 8K, four hours, and what 32-bit offsets reach.
    max_pixels: int = 2**26
    max_seconds: float = 4 * 3600.0
    max_bytes: int = 2**32


DEFAULT_LIMITS = MediaLimits()


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


def load_video(
    source,
    num_frames: int = 8,
    fps: float | None = None,
    times=None,
    decoder: str = "auto",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> VideoFrames:
    """Exactly `num_frames` uniform frames of a video in any accepted form.

    Args:
        source: an encoded video (path, bytes, binary file, datasets' `{"bytes", "path"}`), an opened torchcodec
            decoder, a [`VideoFrames`], an array `(T, H, W, 3)` or a list of frames in any form of [`load_image`].
        num_frames (`int`): frames to return.
        fps (`float`, *optional*): frames a second of a bare array or list.
        times (sequence of `float`, *optional*): their presentation times in seconds, instead of `fps`.
        decoder (`str`): see [`decode_video`].
        limits ([`MediaLimits`]): of encoded files.

    Raises:
        VideoError: missing, empty, broken or above the limits, or a clock that does not fit the frames.
    """
    if hasattr(source, "frames") and hasattr(source, "times"):
        _refuse_clock(source, fps, times)
        return sample_frames(source.frames, num_frames, times=source.times)
    if hasattr(source, "get_frames_at"):  # what datasets.Video decodes to
        _refuse_clock(source, fps, times)
        return _sample_decoder(source, num_frames, limits)
    if isinstance(source, (list, tuple)) or hasattr(source, "shape"):
        return sample_frames(source, num_frames, fps=fps, times=times, limits=limits)
    _refuse_clock(source, fps, times)
    return decode_video(source, num_frames, decoder, limits)


def decode_video(
    source, num_frames: int = 8, decoder: str = "auto", limits: MediaLimits = DEFAULT_LIMITS
) -> VideoFrames:
    """Decode exactly `num_frames` uniform frames of an encoded video, turned as its orientation says.

    `"auto"` asks PyAV first: on sound 8-bit files its pixels are decord's, it skips the frames that nothing needs, and
    it alone tells of damage. Where PyAV is absent or fails for a reason that is not the file's, decord decodes, then
    torchcodec. A decoder asked for by name decodes alone. What no decoder can tell is damage in streams without
    redundancy, such as VP9 or GIF.

    Args:
        source (`str`, `os.PathLike`, `bytes`, binary file or `dict`): the video; a dict has `bytes` or `path`.
        num_frames (`int`): frames to return.
        decoder (`str`): `"auto"`, `"decord"`, `"pyav"` or `"torchcodec"`.
        limits ([`MediaLimits`]): above them a file is refused.

    Returns:
        `VideoFrames`: `num_frames` frames, repeated where the clip has fewer.

    Raises:
        VideoError: the video is missing, empty, damaged, above the limits or not readable.
        ValueError: no such decoder.
    """
    if decoder != "auto" and decoder not in _DECODERS:
        raise ValueError(f"decoder={decoder!r}: use auto, {', '.join(sorted(_DECODERS))}")
    name, data = _open(source, limits)
    reasons = []
    for candidate in _DECODERS if decoder == "auto" else [decoder]:
        try:
            return _DECODERS[candidate](data, num_frames, limits)
        except VideoError as error:  # the file's own fault: another decoder would hide it
            raise VideoError(f"{name}: {error}") from error
        except Exception as error:  # the libraries raise classes of their own, decord some without a common base
            reasons.append(f"{candidate}: {_one_line(error)}")
    raise VideoError(f"{name}: not a readable video ({'; '.join(reasons)})")


def sample_frames(
    frames, num_frames: int, fps: float | None = None, times=None, limits: MediaLimits = DEFAULT_LIMITS
) -> VideoFrames:
    """Exactly `num_frames` uniform frames of an array or a list; frames that are not chosen are never loaded.

    Args:
        frames (array of shape `(T, H, W, 3)` or list): uint8 RGB frames, or images in any form of [`load_image`].
        num_frames (`int`): frames to return.
        fps (`float`, *optional*): frames a second.
        times (sequence of `float`, *optional*): presentation times in seconds, instead of `fps`.
        limits ([`MediaLimits`]): of encoded images.

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
        loaded = {index: load_image(frames[index], limits) for index in dict.fromkeys(chosen.tolist())}
    except ValueError as error:
        raise VideoError(f"list of frames: {error}") from error
    if len({frame.shape for frame in loaded.values()}) > 1:
        raise VideoError(f"list of frames: sizes differ, {sorted({frame.shape[:2] for frame in loaded.values()})}")
    return VideoFrames(np.stack([loaded[index] for index in chosen.tolist()]), times[chosen])


def load_image(source, limits: MediaLimits = DEFAULT_LIMITS) -> np.ndarray:
    """An image as uint8 RGB of shape `(H, W, 3)`, turned as its orientation says, on white where it is transparent.

    Args:
        source: PIL image, path, bytes, binary file, datasets' `{"bytes", "path"}`, or uint8 array of shape `(H, W, 3)`
            or `(H, W)`.
        limits ([`MediaLimits`]): above them a file is refused.

    Raises:
        ValueError: missing, empty, broken, above the limits, or an array of another shape or type.
    """
    if hasattr(source, "shape"):
        array = np.asarray(source)
        grey_or_rgb = array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3)
        if array.dtype != np.uint8 or not grey_or_rgb or 0 in array.shape:
            raise ValueError(f"image of shape {array.shape} and type {array.dtype}: use uint8 of shape (H, W, 3)")
        return np.ascontiguousarray(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))
    if isinstance(source, Image.Image):
        name, data = "PIL image", None
    else:
        name, data = _open(source, limits, kind="image", error=ValueError)
    try:
        if data is None:  # it may be an opened file that is not read yet
            return _rgb_image(source, limits)
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return _rgb_image(image, limits)
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        reason = _one_line(error)
        if isinstance(error, UnidentifiedImageError):  # its text shows a buffer, not a cause
            reason = "unknown format"
        raise ValueError(f"{name}: not a readable image ({reason})") from error


def _rgb_image(image, limits):
    width, height = image.size
    _check_pixels(width, height, limits)
    if image.format == "EPS":
        raise ValueError("EPS is a program, not pixels")
    try:
        image = ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, struct.error):  # broken EXIF data; the pixels may be sound
        pass
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits where it should scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


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
        try:
            times = np.asarray(times, dtype=np.float64).reshape(-1)
        except TypeError as error:
            raise VideoError(f"times of type {type(times).__name__}: give numbers, in seconds") from error
        if len(times) != count or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise VideoError(f"{count} frames came with {len(times)} times: give one a frame, in seconds, in order")
        return times
    if fps is None:
        fps = DEFAULT_FRAMES_PER_SECOND
        _warn_once(f"frames came without `fps` or `times`: {fps:g} frames a second are assumed")
    if not isinstance(fps, numbers.Real) or not 0 < fps < float("inf"):
        raise VideoError(f"frames came with fps={fps!r}: use a positive number")
    return np.arange(count) / fps


def _refuse_clock(source, fps, times):
    if fps is not None or times is not None:
        raise VideoError(f"{type(source).__name__} has its own clock: give fps or times with bare frames only")


@cache
def _warn_once(message):
    logger.warning(message)


def _open(source, limits, kind="video", error=VideoError):
    """Name and data (a path or bytes) of an encoded file that exists, is not empty and not too large."""
    name = f"{kind} bytes"
    if isinstance(source, dict):
        name = source.get("path") or name
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if hasattr(source, "read"):
        name = str(getattr(source, "name", f"{kind} file"))
        try:
            if source.seekable():  # a file that was just written, or read before, stands at its end
                source.seek(0)
            source = source.read(limits.max_bytes + 1)
        except (OSError, ValueError) as cause:  # closed, write-only, or text that is none
            raise error(f"{name}: cannot be read ({_one_line(cause)})") from cause
        if isinstance(source, str):
            raise error(f'{name}: is open as text: open it with mode "rb"')
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = memoryview(source).nbytes
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        size = _file_size(name, kind, error)
    else:
        raise error(f"{kind} of type {type(source).__name__}: use a path, bytes, a binary file or decoded pixels")
    if not size:
        raise error(f"{name}: is empty")
    if size > limits.max_bytes:
        raise error(f"{name}: has more than {limits.max_bytes} bytes (max_bytes)")
    return name, name if isinstance(source, (str, os.PathLike)) else bytes(source)


def _file_size(path, kind, error):
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise error(f"{path}: no such {kind} file") from cause
    except (OSError, ValueError) as cause:  # a circle of links, no permission, a name that cannot be one
        reason = getattr(cause, "strerror", None) or _one_line(cause)
        raise error(f"{path!r}: no readable {kind} file ({reason})") from cause
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise error(f"{path}: no {kind} file ({what})")
    return status.st_size


def _check_pixels(width, height, limits):
    if width * height > limits.max_pixels:
        raise VideoError(f"{width} x {height} pixels are more than {limits.max_pixels} (max_pixels)")


def _check_duration(seconds, limits):
    if seconds > limits.max_seconds:
        raise VideoError(f"{seconds:.0f} seconds are more than {limits.max_seconds:g} (max_seconds)")


def _sample_decoder(decoder, num_frames, limits):
    """Frames of an opened torchcodec decoder."""
    try:
        metadata = decoder.metadata
        chosen = uniform_indices(_at_least_one(metadata.num_frames), num_frames)
        _check_pixels(getattr(metadata, "width", None) or 0, getattr(metadata, "height", None) or 0, limits)
        _check_duration(getattr(metadata, "duration_seconds", None) or 0, limits)
        batch = decoder.get_frames_at(chosen.tolist())
    except VideoError:
        raise
    except Exception as error:  # torchcodec raises RuntimeError, and more
        raise VideoError(f"opened video: not readable ({_one_line(error)})") from error
    return VideoFrames(_rgb_frames(np.asarray(batch.data)), np.asarray(batch.pts_seconds, dtype=np.float64))


def _with_torchcodec(data, num_frames, limits):
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # it may be there, and FFmpeg's libraries not
        raise RuntimeError(f"not usable here: pip install torchcodec, and FFmpeg ({_one_line(error)})") from error
    return _sample_decoder(VideoDecoder(data), num_frames, limits)


def _with_decord(data, num_frames, limits):
    if decord is None:
        raise RuntimeError("not installed: pip install decord")
    reader = decord.VideoReader(io.BytesIO(data) if isinstance(data, bytes) else data)
    count, rate = _at_least_one(len(reader)), reader.get_avg_fps()
    _check_duration(count / rate, limits)
    height, width = reader[0].shape[:2]
    _check_pixels(width, height, limits)
    unique, places = np.unique(uniform_indices(count, num_frames), return_inverse=True)
    times = reader.get_frame_timestamp(unique)[:, 0].astype(np.float64)
    if not (np.abs(times) < 2 * limits.max_seconds).all() or (np.diff(times) < 0).any():  # no usable stamps
        times = unique / rate
    frames = reader.get_batch(unique)
    frames = frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)  # another bridge may be set
    return VideoFrames(_rgb_frames(frames)[places], times[places])


def _with_pyav(data, num_frames, limits):
    if av is None:
        raise RuntimeError("not installed: pip install av")
    index = _read_index(data, limits)
    if index.shown:
        wanted = [index.shown[place] for place in uniform_indices(len(index.shown), num_frames)]
        try:
            frames = _decode_wanted(data, limits, index, set(wanted))
        except VideoError:  # damage, or H.264 that misses what precedes a keyframe: decoding it all tells which
            frames = {}
        if frames.keys() >= set(wanted):
            return _as_video([frames[stamp] for stamp in wanted], wanted, index.time_base, limits)
    # Otherwise, or where packets show nothing: count what comes out, in the order in which it comes.
    chosen = uniform_indices(len(index.stamps), num_frames)
    stamps, frames = _decode_places(data, limits, set(chosen.tolist()))
    if len(stamps) != len(index.stamps):  # not a frame a packet
        chosen = uniform_indices(_at_least_one(len(stamps)), num_frames)
        stamps, frames = _decode_places(data, limits, set(chosen.tolist()))
    times, time_base = [stamps[place] for place in chosen], index.time_base
    if None in stamps or any(after <= before for before, after in zip(stamps, stamps[1:])):
        times, time_base = chosen, 1 / index.rate
    return _as_video([frames[place] for place in chosen.tolist()], times, time_base, limits)


class _Index(NamedTuple):
    """What a container tells of its video's packets, in decoding order, before anything is decoded."""

    stamps: list  # presentation stamp of each packet, or None
    keyframes: list  # places of packets at which decoding can start
    shown: list  # presentation stamps of the frames that are shown, in order; empty if the container gives none
    time_base: float  # seconds of a stamp's unit
    rate: float  # mean frames a second, as the container says


def _read_index(data, limits):
    try:
        container = _open_container(data, limits)
    except av.error.FFmpegError as error:
        raise VideoError(f"not a readable video ({_one_line(error.strerror)})") from error
    with container:
        stream = _video_stream(container)
        context = stream.codec_context
        if not context.width:  # FFmpeg leaves it out where it refuses it
            raise VideoError(f"its frames have no size, or more than {limits.max_pixels} pixels (max_pixels)")
        _check_pixels(context.width, context.height, limits)
        _check_duration((container.duration or 0) / av.time_base, limits)
        if stream.duration:
            _check_duration(stream.duration * stream.time_base, limits)
        stamps, keyframes, shown, ends = [], [], set(), {}
        for packet in _packets(container, [stream, *container.streams.audio]):
            if packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                # B-frames follow in the file what they precede on the screen
                ends[packet.stream.index] = max(ends.get(packet.stream.index, end), end)
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise VideoError(f"damaged or cut off (packet {len(stamps)} is not whole)")
            if packet.is_keyframe:
                keyframes.append(len(stamps))
            if keyframes and not packet.is_discard:  # what comes before the first keyframe cannot be decoded
                shown.add(packet.pts)
            stamps.append(packet.pts)
            if len(stamps) > _MOST_FRAMES_PER_SECOND * limits.max_seconds:
                raise VideoError(f"more than {len(stamps) - 1} frames, too many for {limits.max_seconds:g} seconds")
        _check_whole(container, stream, len(stamps), ends)
        if None in stamps or context.has_b_frames and sorted(stamps) == stamps:  # stamps of decoding, as AVI has them
            shown = ()
        elif shown:  # nor what follows the first keyframe and is shown before it
            shown = {stamp for stamp in shown if stamp >= stamps[keyframes[0]]}
        rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FRAMES_PER_SECOND)
        index = _Index(stamps, keyframes, sorted(shown), float(stream.time_base), rate)
    if index.shown:
        _check_duration((index.shown[-1] - index.shown[0]) * index.time_base, limits)
    return index


def _check_whole(container, stream, count, ends):
    """Refuse a file that ends long before its header says; what is left of it would pass for all of it."""
    if not count:
        raise VideoError("it has no frames" if not stream.frames else "cut off: none of its frames is there")
    if container.format.name == "avi":
        if count < 0.9 * stream.frames:
            raise VideoError(f"cut off: {count} of {stream.frames} frames are there")
    elif container.format.name in ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"):  # the rest only estimate
        if stream.duration:
            promised = float(stream.duration * stream.time_base)
            held = float(ends.get(stream.index, 0) - (stream.start_time or 0) * stream.time_base)
        else:
            promised = (container.duration or 0) / av.time_base
            held = float(max(ends.values(), default=0)) - (container.start_time or 0) / av.time_base
        if promised - held > max(0.5, 0.05 * promised):
            raise VideoError(f"cut off: {held:.1f} of {promised:.1f} seconds are there")


def _decode_wanted(data, limits, index, wanted):
    """Frames by presentation stamp; packets that none of them needs are not decoded."""
    runs = _runs(index, wanted)
    found = {}
    with _open_container(data, limits) as container:
        stream = _decoding_stream(container, limits)
        context = stream.codec_context
        for place, packet in enumerate(_packets(container, [stream])):
            if not runs:
                break
            first, last = runs[0]
            if place < first:
                continue
            frames = []
            if packet.pts >= index.stamps[first]:  # others need what precedes the run, and nothing needs them
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                frames = _decode_packet(context, packet)
            if place == last:
                runs.pop(0)
                frames += _decode_packet(context, None)
                if runs:
                    context.flush_buffers()
            found.update((frame.pts, frame) for frame in frames if frame.pts in wanted)
    for frame in found.values():
        _check_sound(frame)
    return found


def _runs(index, wanted):
    """Ranges of packets, first and last, that must be decoded for the wanted stamps: each from a keyframe on."""
    runs = []
    for place, stamp in enumerate(index.stamps):
        if stamp not in wanted:
            continue
        keys = index.keyframes[: bisect.bisect_right(index.keyframes, place)]
        # Pictures that are shown before the keyframe they follow may need the keyframe before it.
        first = next((key for key in reversed(keys) if index.stamps[key] <= stamp), 0)
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((first, place))
    return runs


def _decode_places(data, limits, places):
    """Decode everything: the stamps of all frames, and the frames at the places."""
    stamps, frames = [], {}
    for place, frame in enumerate(_decode_all(data, limits)):
        stamps.append(frame.pts)
        if place in places:
            frames[place] = frame
    return stamps, frames


def _decode_all(data, limits):
    with _open_container(data, limits) as container:
        stream = _decoding_stream(container, limits)
        for packet in itertools.chain(_packets(container, [stream]), [None]):
            for frame in _decode_packet(stream.codec_context, packet):
                _check_sound(frame)
                yield frame


def _decode_packet(context, packet):
    try:
        return context.decode(packet)
    except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError) as error:
        raise VideoError(f"damaged ({_one_line(error.strerror)})") from error


def _check_sound(frame):
    if frame.is_corrupt:
        raise VideoError(f"damaged (frame at {frame.time or 0:.2f} s decodes with errors)")


def _open_container(data, limits):
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "max_pixels": _coded_pixels(limits)}
    # A path in full is never taken for a protocol; words in another encoding do not matter.
    file = io.BytesIO(data) if isinstance(data, bytes) else f"file:{os.path.abspath(data)}"
    return av.open(file, options=options, metadata_errors="replace")


def _coded_pixels(limits):
    """The limit as FFmpeg has it, on pixels before the codec's padding is cut away."""
    return str(2 * limits.max_pixels)


def _packets(container, streams):
    try:
        yield from (packet for packet in container.demux(streams) if packet.size)
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise VideoError(f"damaged or cut off ({_one_line(error.strerror)})") from error


def _video_stream(container):
    """The first video stream that is not the cover picture of a sound file."""
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise VideoError("it has no video stream")
    return streams[0]


def _decoding_stream(container, limits):
    stream = _video_stream(container)
    context = stream.codec_context
    context.options = {"err_detect": "crccheck+explode", "max_pixels": _coded_pixels(limits)}
    if context.name in ("h264", "hevc"):  # faster; and H.264 frames say that they are damaged in this mode only
        context.thread_type, context.thread_count = "FRAME", 2
    return stream


def _as_video(frames, stamps, time_base, limits):
    width, height = frames[0].width, frames[0].height
    _check_pixels(width, height, limits)
    arrays = {}  # a short clip repeats frames
    for frame in frames:
        if id(frame) not in arrays:
            _check_pixels(frame.width, frame.height, limits)
            # sizes may change
            arrays[id(frame)] = frame.to_ndarray(format="rgb24", width=width, height=height, **_ONE_THREAD)
    pixels = np.stack([arrays[id(frame)] for frame in frames])
    times = np.array([float(stamp) for stamp in stamps]) * time_base
    return VideoFrames(_turned(pixels, frames[0].side_data.get("DISPLAYMATRIX")), times)


def _turned(frames, matrix):
    """Frames as the display matrix shows them: quarter turns and mirrors; other angles are left alone."""
    if matrix is None:
        return frames
    (a, b), (c, d) = np.frombuffer(matrix, dtype=np.int32)[[0, 1, 3, 4]].reshape(2, 2)  # x' = ax + cy, y' = bx + dy
    if a and d and not b and not c:
        right, down = a, d
    elif b and c and not a and not d:
        frames, right, down = frames.swapaxes(1, 2), c, b
    else:
        return frames
    return np.ascontiguousarray(frames[:, :: 1 if down > 0 else -1, :: 1 if right > 0 else -1])


def _at_least_one(count):
    if not count or count < 1:
        raise VideoError("it has no frames")
    return count


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


# In the order in which "auto" asks them.
_DECODERS = {"pyav": _with_pyav, "decord": _with_decord, "torchcodec": _with_torchcodec}
