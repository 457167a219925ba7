"""Video files: inspection, repair, and the 8-frame all-intra MP4 of the default flavour. All through PyAV.

A file is read to its end, so that damage in its middle is found as well: decoders otherwise conceal it.
"""

import io
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from modeling_gve.video_gve import DEFAULT_FRAMES_PER_SECOND, load_image, uniform_indices


NUM_FRAMES = 8  # of the protocol
MAX_PIXELS = 199 * 28 * 28  # fewer than 200 visual tokens a frame, for Qwen2.5-VL's patches
CLOCK = 90_000  # ticks a second: exact for the usual frame rates
# Not in the paper: constant rate factors of the 8 frames, of which the first is taken that keeps to the bytes, else
# the last. The first gives the files' scores, the bytes keep the benchmark in a few GB: tables in the README.
CLIP_QUALITIES = (10, 12, 14, 16, 18)
CLIP_BYTES = 256 << 10
# Not in the paper: of files that are decoded and encoded again.
REPAIR_QUALITY = 17
# Not in the paper: a file that decodes to less than this share of its frames shows another video and is not repaired.
MIN_DECODED_SHARE = 0.5
# Not in the paper: no side of a frame may be smaller, as Qwen2.5-VL's smallest patch has 28 pixels.
MIN_SIDE = 28
# Not in the paper: a folder of frames has no clock, and the authors do not give the rate that they extracted at.
FOLDER_FPS = DEFAULT_FRAMES_PER_SECOND
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
REMUXABLE = ("h264", "hevc", "av1", "vp9", "mpeg4")  # codecs that MP4 holds and readers expect in it


@dataclass
class Inspection:
    """What a video file is.

    Attributes:
        container (`str`): FFmpeg's name of the format.
        codec (`str`): of the video stream.
        width, height (`int`): pixels.
        n_listed (`int`): frames that the file lists.
        n_decoded (`int`): frames that decode.
        duration_s (`float`): seconds from the first frame to the end of the last.
        problems (list of `str`): why it needs repair; empty for a sound file.
        frames (`np.ndarray` of shape `(T, H, W, 3)`): the uniform frames, at most as many as asked for.
        pictures (list of T `av.VideoFrame`): the same as the decoder gave them; empty for a folder of frames.
        times (`np.ndarray` of shape `(T,)`): their presentation times, seconds.
    """

    container: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    n_listed: int = 0
    n_decoded: int = 0
    duration_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    frames: np.ndarray | None = None
    pictures: list[av.VideoFrame] = field(default_factory=list)
    times: np.ndarray | None = None

    @property
    def facts(self):
        """Everything but the pixels, for a record."""
        return {
            "container": self.container,
            "codec": self.codec,
            "width": self.width,
            "height": self.height,
            "n_frames": self.n_decoded,
            "duration_s": round(self.duration_s, 3),
        }


def inspect(path, num_frames=NUM_FRAMES):
    """Reads a video to its end.

    Args:
        path (`Path` or binary file): the video.
        num_frames (`int`): uniform frames to keep; a shorter clip gives all that it has, each once.

    Returns:
        `Inspection`: with `problems`, never an error, whatever the file holds.
    """
    found = Inspection()
    try:
        stamps = _list_frames(path, found)
        if stamps:
            _decode(path, stamps, num_frames, found)
    except Exception as error:  # PyAV raises some thirty classes
        found.problems.append(_one_line(error))
    return found


def _opened(source):
    if not hasattr(source, "read"):
        return av.open(str(source))
    source.seek(0)
    return av.open(source)


def _list_frames(path, found):
    """Presentation stamps in order; fills what the container says of itself."""
    with _opened(path) as container:
        found.container = container.format.name
        if not container.streams.video:
            found.problems.append("it has no video stream")
            return []
        stream = container.streams.video[0]
        found.codec = stream.codec_context.name
        found.width, found.height = stream.codec_context.width, stream.codec_context.height
        listed = [packet for packet in container.demux(stream) if packet.size]
        packets = [packet for packet in listed if not packet.is_discard]  # an edit list hides the others
        stamps = sorted({packet.pts for packet in packets if packet.pts is not None})
        found.n_listed = len(packets)
        if len(stamps) < len(packets):
            found.problems.append(f"{len(packets) - len(stamps)} of {len(packets)} frames have no time of their own")
        if any(packet.is_corrupt for packet in packets):
            found.problems.append("packets are marked as damaged")
        if stream.frames and len(listed) < stream.frames:
            found.problems.append(f"the header promises {stream.frames} frames, the file holds {len(listed)}")
        if min(found.width, found.height) < MIN_SIDE:
            found.problems.append(f"frames of {found.width} x {found.height} pixels are below {MIN_SIDE} a side")
        if not packets:
            found.problems.append("it has no frames")
        elif stamps:
            gap = (stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1)
            found.duration_s = float((stamps[-1] - stamps[0] + gap) * stream.time_base)
        return stamps


def _decode(path, stamps, num_frames, found):
    wanted = [stamps[index] for index in dict.fromkeys(uniform_indices(len(stamps), num_frames).tolist())]
    kept, sizes = {}, set()
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            found.n_decoded += 1
            sizes.add((frame.width, frame.height))
            if frame.is_corrupt:
                found.problems.append(f"frame {found.n_decoded - 1} is damaged")
            if frame.pts in wanted and frame.pts not in kept:
                kept[frame.pts] = frame
        time_base = stream.time_base
    if found.n_decoded < len(stamps):
        found.problems.append(f"{found.n_decoded} of {len(stamps)} frames decode")
    if len(sizes) > 1:
        found.problems.append(f"the frame size changes: {sorted(sizes)}")
    elif len(kept) < len(wanted):
        found.problems.append(f"{len(wanted) - len(kept)} of its {len(wanted)} uniform frames are missing")
    else:
        found.pictures = [kept[stamp] for stamp in wanted]
        found.frames = np.stack([picture.to_ndarray(format="rgb24", threads=1) for picture in found.pictures])
        found.times = np.array([float(stamp * time_base) for stamp in wanted])


def repair(path, found):
    """Mends a file by copying its stream into a fresh MP4, or else by encoding anew what decodes.

    Args:
        path (`Path`): the file.
        found (`Inspection`): with problems.

    Returns:
        `(str, bytes, Inspection)`: `"remux"` or `"re-encode"`, the new file and its inspection;
        `("broken", None, found)` where neither helps.
    """
    for action, mend in (("remux", _remux), ("re-encode", _encode_again)):
        try:
            content = mend(path, found)
        except Exception:  # the next way may still work, and the inspection has named the problem
            continue
        if content is None:
            continue
        mended = inspect(io.BytesIO(content))
        enough = mended.n_decoded >= max(1, math.ceil(MIN_DECODED_SHARE * found.n_listed))
        if not mended.problems and enough:
            return action, content, mended
    return "broken", None, found


def _remux(path, found):
    if found.codec not in REMUXABLE:
        return None
    buffer = io.BytesIO()
    with av.open(str(path)) as source, _mp4(buffer) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return buffer.getvalue()


def _encode_again(path, found):
    buffer = io.BytesIO()
    with av.open(str(path)) as source, _mp4(buffer) as target:
        stream = source.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        encoder, size = None, None
        last = -1
        for frame in _readable_frames(source, stream):
            if size is None:
                size = (max(frame.width // 2 * 2, MIN_SIDE), max(frame.height // 2 * 2, MIN_SIDE))
                encoder = _h264(target, *size, REPAIR_QUALITY, intra=False)
            time = frame.time if frame.time is not None else float((last + 1) / CLOCK + 1 / rate)
            stamp = max(round(time * CLOCK), last + 1)
            picture = frame.reformat(*size, "yuv420p", threads=1)
            picture.pts, picture.time_base, last = stamp, Fraction(1, CLOCK), stamp
            target.mux(encoder.encode(picture))
        if encoder is None:
            return None
        target.mux(encoder.encode())
    return buffer.getvalue()


def _readable_frames(source, stream):
    """Frames that decode without damage, whatever lies between them."""
    for packet in source.demux(stream):
        try:
            for frame in packet.decode():
                if not frame.is_corrupt:
                    yield frame
        except av.error.FFmpegError:
            continue


def read_folder(path, fps=FOLDER_FPS):
    """Inspection of a folder of frames, as an extracted video lies in the authors' release; names give the order."""
    found = Inspection(container="folder")
    files = frame_files(path)
    found.n_listed = len(files)
    if not files:
        found.problems.append("the folder has no frames")
        return found
    try:
        chosen = dict.fromkeys(uniform_indices(len(files), NUM_FRAMES).tolist())
        frames = [load_image(str(files[index])) for index in chosen]
        found.frames, found.times = np.stack(frames), np.array([index / fps for index in chosen])
    except ValueError as error:
        found.problems.append(_one_line(error))
        return found
    found.codec = files[0].suffix.lstrip(".").lower()
    found.height, found.width = found.frames.shape[1:3]
    found.n_decoded, found.duration_s = len(files), len(files) / fps
    return found


def frame_files(path):
    """Pictures of a folder of frames, in natural order (2 before 10)."""
    files = [file for file in Path(path).iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
    return sorted(files, key=lambda file: (int("".join(filter(str.isdigit, file.stem)) or 0), file.name))


def encode_folder(path, fps=FOLDER_FPS):
    """A folder of frames as one MP4 of all of them."""
    frames = (load_image(str(file)) for file in frame_files(path))
    return encode(frames, (index / fps for index in range(1 << 40)), REPAIR_QUALITY, intra=False)


def encode_clip(found, qualities=CLIP_QUALITIES):
    """The 8-frame video of an inspected one: a small all-intra MP4 of its uniform frames at their times.

    Frames that keep their size are encoded as they were decoded: by way of RGB their colours, which H.264 stores at
    half the resolution, would be resampled, and that costs more than the coarsest rate factor (see the README).

    Args:
        found (`Inspection`): with frames.
        qualities (sequence of `int`): x264's constant rate factors, finest first; of them the first one that gives at
            most `CLIP_BYTES`, else the last.

    Returns:
        `bytes`: the same for the same video.
    """
    for quality in qualities:
        clip = _encode_clip(found, quality)
        if len(clip) <= CLIP_BYTES:
            break
    return clip


def _encode_clip(found, quality):
    size = found.frames.shape[1:3]
    kept = [("yuv420p", *size)] * len(found.times) if clip_size(*size) == size else None
    if kept == [(picture.format.name, picture.height, picture.width) for picture in found.pictures]:
        return encode(found.pictures, found.times, quality, intra=True)
    return encode_frames(found.frames, found.times, quality)


def encode_frames(frames, times, quality=CLIP_QUALITIES[-1], max_pixels=MAX_PIXELS):
    """A small all-intra MP4 of RGB frames at these times.

    Frames above `max_pixels` are scaled to the size that Qwen2.5-VL's processor would scale them to, with its filter,
    so that nothing is scaled again when the clip is embedded; smaller frames keep their size.

    Args:
        frames (`np.ndarray` of shape `(T, H, W, 3)`): uint8 RGB.
        times (`np.ndarray` of shape `(T,)`): presentation times in seconds, strictly rising.
        quality (`int`): x264's constant rate factor; lower is better.
        max_pixels (`int`): most pixels a frame.

    Returns:
        `bytes`: the same for the same frames and times.
    """
    height, width = clip_size(*frames.shape[1:3], max_pixels)
    if (height, width) != frames.shape[1:3]:
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        scaled = resize(pixels, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
        frames = scaled.permute(0, 2, 3, 1).numpy()
    return encode(frames, times, quality, intra=True)


def clip_size(height, width, max_pixels=MAX_PIXELS):
    """Height and width of the 8-frame video of a video of this size."""
    factor = 28
    if round(height / factor) * round(width / factor) * factor**2 > max_pixels and max(height, width) < 200 * min(
        height, width
    ):
        return smart_resize(height, width, factor=factor, min_pixels=factor**2, max_pixels=max_pixels)
    return height // 2 * 2, width // 2 * 2


def encode(frames, times, quality, intra):
    """H.264 in MP4 of frames at given times; the same input gives the same bytes (one thread, no date).

    Args:
        frames (iterable of `np.ndarray` of shape `(H, W, 3)` or of `av.VideoFrame`): uint8 RGB, an odd last row or
            column is left out; or frames in yuv420p, which keep what their colours mean.
        times (iterable of `float`): presentation times in seconds, strictly rising.
        quality (`int`): x264's constant rate factor.
        intra (`bool`): every frame by itself.
    """
    buffer = io.BytesIO()
    with _mp4(buffer) as container:
        encoder = None
        for picture, time in zip(frames, times):
            frame = picture if isinstance(picture, av.VideoFrame) else _even(picture)
            if encoder is None:
                encoder = _h264(container, frame.width, frame.height, quality, intra)
                if frame is picture:
                    _keep_colours(encoder.codec_context, frame)
            frame.pts, frame.time_base = round(float(time) * CLOCK), Fraction(1, CLOCK)
            container.mux(encoder.encode(frame))
        container.mux(encoder.encode())
    return buffer.getvalue()


def _even(pixels):
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")


def _keep_colours(context, frame):
    context.colorspace, context.color_range = frame.colorspace, frame.color_range
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc


def _mp4(buffer):
    return av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"})


def _h264(container, width, height, quality, intra):
    stream = container.add_stream("libx264")
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = Fraction(1, CLOCK)
    stream.codec_context.time_base = Fraction(1, CLOCK)
    stream.codec_context.thread_count = 1
    options = {"crf": str(quality), "preset": "medium", "flags": "+bitexact", "bf": "0"}
    stream.options = {**options, **({"g": "1"} if intra else {})}
    return stream


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__
