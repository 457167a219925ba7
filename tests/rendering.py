"""Frames and video files that tests draw for themselves."""

from fractions import Fraction

import av
import numpy as np


def draw_frames(num_frames=8, height=56, width=56, seed=0):
    """A bright square that moves over a seeded background, uint8 of shape `(T, H, W, 3)`."""
    background = np.random.default_rng(seed).integers(0, 160, (height // 8, width // 8, 3), dtype=np.uint8)
    frames = np.repeat(background.repeat(8, 0).repeat(8, 1)[None], num_frames, axis=0)
    for index, frame in enumerate(frames):
        left = round(index / max(num_frames - 1, 1) * (width - 16))
        frame[height // 2 - 8 : height // 2 + 8, left : left + 16] = (255, 200, seed * 37 % 256)
    return frames


def write_video(path, frames, fps=8, times=None):
    """Encode frames as H.264 in MP4; `times` in milliseconds override the constant rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
