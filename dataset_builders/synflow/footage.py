"""Looking at a video once: what quality control, near-duplicates and cutting need to know of it; and cutting it."""

import io
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from scipy.fft import dctn

from dataset_builders.mini.render import repeatable


# Not in the paper: how closely a video is looked at.
SAMPLE_FPS = 6.0
THUMBNAIL = 64  # pixels
MOTION_SECONDS = 0.5
SIGNATURE_FRAMES = 8
TRACK_FPS = 3.0
STILL_PLACES = (0.5, 0.2, 0.8, 0.35, 0.65, 0.05, 0.95, 0.125, 0.275, 0.425)  # in a shot, 0 to 1
SIGNATURE_BITS = 128  # a frame: 64 of its luma, 32 of each chroma
LUMA_BYTES = 8  # that come first


class FootageError(ValueError):
    """A video that is dropped; `args` are the reason's name and a sentence."""

    @property
    def reason(self):
        return self.args[0]

    def __str__(self):
        return self.args[1]


class Footage(NamedTuple):
    """A video as seen in passing.

    Attributes:
        seconds (`float`): its length.
        width, height (`int`): in pixels.
        times (`np.ndarray` of shape `(T,)`): seconds of the thumbnails.
        thumbnails (`np.ndarray` of shape `(T, 64, 64, 3)`): uint8 RGB.
    """

    seconds: float
    width: int
    height: int
    times: np.ndarray
    thumbnails: np.ndarray


def one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def look_at(data, limits, fps=SAMPLE_FPS):
    """Decode a video from beginning to end, keeping thumbnails.

    Args:
        data (`bytes` or `str`): the file or its path.
        limits (`VideoQuality`): bounds on length, size and bytes.
        fps (`float`, *optional*): thumbnails a second, at most.

    Raises:
        FootageError: unreadable, cut off, or out of bounds.
    """
    try:
        with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
            return _look(container, limits, fps)
    except FootageError:
        raise
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise FootageError("video_unreadable", one_line(error)) from error


def _look(container, limits, fps):
    if not container.streams.video:
        raise FootageError("video_unreadable", "it has no video stream")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if min(width, height) < limits.min_side:
        raise FootageError("video_too_small", f"{width} x {height} pixels, below {limits.min_side}")
    if max(width, height) > limits.max_side:
        raise FootageError("video_too_large", f"{width} x {height} pixels, above {limits.max_side}")
    stream.thread_type = "AUTO"
    times, thumbnails, count, first, last, step = [], [], 0, None, 0.0, 0.0
    for frame in container.decode(stream):
        if frame.time is None:
            raise FootageError("video_unreadable", "its frames have no time stamps")
        first = frame.time if first is None else first
        step = max(step, frame.time - first - last) if count < 2 else frame.time - first - last
        last = frame.time - first
        count += 1
        if last > limits.max_seconds:
            raise FootageError("video_too_long", f"more than {limits.max_seconds:g} s")
        if not times or last - times[-1] >= 0.999 / fps:
            times.append(last)
            # One thread: to start one a core, PyAV's default, takes 60 times as long as the conversion.
            small = frame.reformat(THUMBNAIL, THUMBNAIL, "rgb24", interpolation="AREA", threads=1)
            thumbnails.append(small.to_ndarray())
    if not count:
        raise FootageError("video_unreadable", "it has no frames")
    if stream.frames and count < 0.9 * stream.frames:
        raise FootageError("video_truncated", f"{count} of {stream.frames} frames can be decoded")
    seconds = last + step
    if seconds < limits.min_seconds:
        raise FootageError("video_too_short", f"{seconds:.2f} s, below {limits.min_seconds:g}")
    return Footage(seconds, width, height, np.array(times), np.stack(thumbnails))


def motion(footage):
    """How much moves, in levels of 0 to 255: the median over time of how far the most changed 0.5% of the picture go.

    Half a second lies between the pictures compared, and the colour that changes most counts. A still picture has the
    noise of its codec (below 3 for rendered ones); a cut between two stills does not move the median.
    """
    pictures = footage.thumbnails.astype(np.int16)
    later = np.searchsorted(footage.times, footage.times + MOTION_SECONDS - 1e-6)
    pairs = [(i, j) for i, j in enumerate(later) if j < len(pictures)] or [(0, len(pictures) - 1)]
    before, after = np.transpose(pairs)
    changes = np.abs(pictures[after] - pictures[before]).max(axis=3)
    return float(np.median(np.percentile(changes, 99.5, axis=(1, 2))))


def shots(footage, settings):
    """`[(start, end)]` in seconds: cut where a frame differs much more from the one before than its neighbours do.

    Args:
        footage (`Footage`): the video.
        settings (`Cutting`): how different a new shot looks, and its least length.
    """
    pictures = footage.thumbnails.astype(np.float32)
    steps = np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3))
    cuts = [0.0]
    for i, step in enumerate(steps):
        around = np.delete(steps[max(0, i - 4) : i + 5], min(i, 4))
        usual = np.median(around) if len(around) else 0.0
        if step > settings.shot_difference and step > settings.shot_ratio * usual:
            when = float(footage.times[i + 1])
            if when - cuts[-1] >= settings.min_shot_seconds and footage.seconds - when >= settings.min_shot_seconds:
                cuts.append(when)
    return list(zip(cuts, [*cuts[1:], footage.seconds]))


def signature(footage):
    """Perceptual hash: `(8, 16)` uint8, the [`frame_hashes`] of 8 uniform frames."""
    chosen = np.linspace(0, len(footage.thumbnails) - 1, SIGNATURE_FRAMES).round().astype(int)
    return frame_hashes(footage.thumbnails[chosen])


def track(footage):
    """Seconds `(T,)` and [`frame_hashes`] `(T, 16)` of thumbnails, at most `TRACK_FPS` a second."""
    chosen = []
    for k, time in enumerate(footage.times):
        if not chosen or time - footage.times[chosen[-1]] >= 0.999 / TRACK_FPS:
            chosen.append(k)
    return footage.times[chosen], frame_hashes(footage.thumbnails[chosen])


def frame_hashes(thumbnails):
    """Perceptual hashes of frames `(T, 64, 64, 3)`: `(T, 16)` uint8, 128 bits each.

    A bit tells whether a low frequency of the frame's cosine transform lies above the median, 64 of luma and 32 of
    each colour difference, so scale, crop by a hair and codec change few of them.
    """
    red, green, blue = np.moveaxis(thumbnails.astype(np.float32), 3, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    bits = []
    for plane, size in ((luma, 64), (red - luma, 32), (blue - luma, 32)):
        low = dctn(plane, axes=(1, 2), norm="ortho")[:, :9, :9].reshape(len(thumbnails), -1)[:, 1 : size + 1]
        # Frequencies that are all but absent would be decided by the codec's noise: they count as below.
        bits.append(low > np.maximum(np.median(low, axis=1, keepdims=True), 0) + 1.0)
    return np.packbits(np.concatenate(bits, axis=1), axis=1)


def frame_times(spans, count):
    """`count` times at which to take stills: the middles of the shots, longest first, then other places in them."""
    ordered = sorted(spans, key=lambda span: (span[0] - span[1], span[0]))
    times = [start + part * (end - start) for part in STILL_PLACES for start, end in ordered]
    return [round(time, 3) for time in times[:count]]


def clip_spans(spans, seconds, count, min_seconds):
    """At most `count` spans in seconds to cut clips from: shots, longest first; an uncut video's middle half, then its
    first and its last.
    """
    if len(spans) > 1:
        ordered = sorted(spans, key=lambda span: (span[0] - span[1], span[0]))
        return [(round(start, 3), round(end, 3)) for start, end in ordered[:count]]
    length = min(seconds, max(min_seconds, seconds / 2))
    starts = ((seconds - length) / 2, 0.0, seconds - length) if length < seconds else (0.0,)
    return [(round(start, 3), round(start + length, 3)) for start in starts[:count]]


def read_frames(data, times):
    """The frames shown at `times` (seconds, in any order), as a list of `(H, W, 3)` uint8."""
    order = np.argsort(times, kind="stable")
    found, previous, first = {}, None, None
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        waiting = list(order)
        for frame in container.decode(video=0):
            first = frame.time if first is None else first
            while waiting and frame.time - first > times[waiting[0]] + 1e-6:
                found[waiting.pop(0)] = previous or frame
            if not waiting:
                break
            previous = frame
        for index in waiting:
            found[index] = previous
    return [found[index].to_ndarray(format="rgb24", threads=1) for index in range(len(times))]


def cut_clip(data, start, end):
    """The span of a video as an H.264 file with a clock of its own; the same input gives the same bytes."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as source:
        stream = source.streams.video[0]
        rate = stream.average_rate or 25
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            output = container.add_stream("libx264", rate=rate)
            output.width, output.height = stream.codec_context.width // 2 * 2, stream.codec_context.height // 2 * 2
            output.pix_fmt = "yuv420p"
            output.codec_context.thread_count = 1
            output.codec_context.time_base = stream.time_base
            output.options = {"crf": "20", "preset": "veryfast", "flags": "+bitexact", **repeatable()}
            first, begin = None, None
            for frame in source.decode(stream):
                first = frame.time if first is None else first
                moment = frame.time - first
                if moment >= end - 1e-6:
                    break
                if moment < start - 1e-6:
                    continue
                begin = frame.pts if begin is None else begin
                frame = frame.reformat(output.width, output.height, "yuv420p", threads=1)
                frame.pts -= begin
                frame.pict_type = 0
                container.mux(output.encode(frame))
            if begin is None:
                raise FootageError("video_unreadable", f"no frame lies between {start} and {end} s")
            container.mux(output.encode())
    return buffer.getvalue()


def encode_jpeg(frame, quality, side=None):
    """A frame as JPEG, its longer side at most `side` pixels."""
    image = Image.fromarray(frame)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
