"""Reading videos and images: uniform frames, real clocks, every accepted form, and messages of what cannot be read."""

import importlib
import io
import os
import struct
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rendering import draw_frames, write_video

from modeling_gve import VideoError, VideoFrames, decode_video, video_gve
from modeling_gve.video_gve import MediaLimits, load_image, load_video, mean_spacing, sample_frames, uniform_indices


def usable(decoder):
    """A decoder, skipped where it is not installed or, as torchcodec, lacks FFmpeg's libraries."""
    try:
        if decoder == "torchcodec":
            importlib.import_module("torchcodec.decoders")
        missing = getattr(video_gve, {"pyav": "av"}.get(decoder, decoder), decoder) is None
    except (ImportError, OSError, RuntimeError):
        missing = True
    return pytest.param(decoder, marks=pytest.mark.skipif(missing, reason=f"{decoder} is not usable here"))


DECODERS = [usable("pyav"), usable("decord"), usable("torchcodec")]


def test_uniform_indices_include_both_ends_and_repeat_frames_of_short_clips():
    assert uniform_indices(8, 8).tolist() == list(range(8))
    assert uniform_indices(300, 8)[[0, -1]].tolist() == [0, 299]
    assert np.ptp(np.diff(uniform_indices(300, 8))) <= 1
    assert uniform_indices(3, 8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert uniform_indices(1, 8).tolist() == [0] * 8


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_agree_on_pixels_and_times(decoder, video_path):
    for source in (video_path, Path(video_path).read_bytes()):
        video = decode_video(source, decoder=decoder)
        chosen = uniform_indices(24, 8)
        assert video.frames.shape == (8, 56, 56, 3) and video.frames.dtype == np.uint8
        np.testing.assert_allclose(video.times, chosen / 8, atol=1e-6)
        assert np.abs(video.frames.astype(int) - draw_frames(24)[chosen]).mean() < 8  # lossy, but the right frames
        np.testing.assert_array_equal(video.frames, decode_video(video_path).frames)


@pytest.mark.parametrize("decoder", DECODERS)
def test_presentation_times_of_an_uneven_clock_are_kept(decoder, tmp_path):
    times = [0, 500, 1000, 2000, 4000, 4500, 6000, 9000]
    path = write_video(tmp_path / "uneven.mp4", draw_frames(8), times=times)
    np.testing.assert_allclose(decode_video(path, decoder=decoder).times, np.array(times) / 1000, atol=2e-3)
    assert mean_spacing(decode_video(path, decoder=decoder).times) == pytest.approx(9 / 7, abs=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_short_clip_repeats_its_frames(decoder, tmp_path):
    video = decode_video(write_video(tmp_path / "short.mp4", draw_frames(2), fps=4), decoder=decoder)
    assert len(video.frames) == 8 and (video.frames[0] == video.frames[3]).all()
    np.testing.assert_allclose(video.times, [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25], atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_orientation_is_honoured(decoder, matrix, tmp_path, video_path):
    path = tmp_path / "turned.mp4"
    path.write_bytes(with_display_matrix(Path(video_path).read_bytes(), matrix))
    turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)].index(matrix)
    upright = decode_video(video_path, decoder=decoder).frames
    expected = np.rot90(upright, turns, axes=(1, 2))
    np.testing.assert_array_equal(decode_video(path, decoder=decoder).frames, expected)


def test_a_mirrored_video_is_mirrored_back(tmp_path, video_path):
    path = tmp_path / "mirrored.mp4"
    path.write_bytes(with_display_matrix(Path(video_path).read_bytes(), (-1, 0, 0, 1)))
    np.testing.assert_array_equal(decode_video(path).frames, decode_video(video_path).frames[:, :, ::-1])


def with_display_matrix(data, matrix):
    place = data.index(b"tkhd") + 44  # in a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    return data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :]


CODECS = {
    "single.mp4": ("libx264", "yuv420p", {}),
    "groups.mp4": ("libx264", "yuv420p", {"g": "6"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=8:open-gop=0"}),
    "vp8.webm": ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "flash.flv": ("flv", "yuv420p", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "full_range.avi": ("mjpeg", "yuvj420p", {}),
    "lossless.mkv": ("ffv1", "yuv420p", {}),
}


@pytest.mark.parametrize("decoder", ["decord", usable("torchcodec")])
@pytest.mark.parametrize("name", CODECS)
def test_pixels_of_the_automatic_choice_are_those_of_every_decoder(name, decoder, tmp_path):
    """What lets "auto" prefer PyAV: on sound 8-bit files it gives decord's pixels, and it decodes less."""
    if decoder == "decord" and video_gve.decord is None:
        pytest.skip("decord is not installed")
    codec, pixels, options = CODECS[name]
    path = write_clip(tmp_path / name, draw_frames(40, 48, 64), codec, pixels, **options)
    ours, theirs = decode_video(path), decode_video(path, decoder=decoder)
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    np.testing.assert_allclose(np.diff(ours.times), np.diff(theirs.times), atol=2e-3)


@pytest.mark.parametrize("name", ["groups.mp4", "mpeg4.avi", "b_frames.avi", "stream.ts", "open.mkv", "open.mp4"])
def test_skipped_packets_change_no_pixel(name, tmp_path):
    """Against every frame, decoded in order; of open groups and of transport streams decord gives wrong frames."""
    extra = {
        "b_frames.avi": ("libx264", "yuv420p", {}),
        "stream.ts": ("libx264", "yuv420p", {"g": "6"}),
        "open.mkv": ("libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=6"}),
        "open.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=8:open-gop=1"}),
    }
    codec, pixels, options = {**CODECS, **extra}[name]
    path = write_clip(tmp_path / name, draw_frames(40, 48, 64), codec, pixels, **options)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == 40
    for num_frames in (2, 8, 48):
        chosen = uniform_indices(40, num_frames)
        video = decode_video(path, num_frames)
        np.testing.assert_array_equal(video.frames, np.stack([every[index] for index in chosen]))
        np.testing.assert_allclose(video.times - video.times[0], chosen / 8, atol=2e-3)


def test_videos_whose_stamps_cannot_be_trusted_are_decoded_once(tmp_path, monkeypatch):
    """Noise makes x264 announce reordered frames and write none: its stamps look like those of decoding."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "noise.mp4", frames, "libx264", "yuv420p", crf="1")
    passes, decode_all = [], video_gve._decode_all
    monkeypatch.setattr(video_gve, "_decode_all", lambda *a: passes.append(None) or decode_all(*a))
    video = decode_video(path, 4)
    assert len(passes) == 1
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = uniform_indices(12, 4)
    np.testing.assert_array_equal(video.frames, np.stack([every[index] for index in chosen]))
    np.testing.assert_allclose(video.times - video.times[0], chosen / 8, atol=2e-3)


def write_clip(path, frames, codec, pixels, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def test_damage_and_missing_ends_are_reported(tmp_path, video_path):
    data = bytearray(Path(video_path).read_bytes())
    start = data.index(b"mdat")
    middle = range(start + (data.index(b"moov") - start) // 2, data.index(b"moov"))
    for place in list(middle)[: len(middle) // 2]:
        data[place] ^= 0x55
    one_line_error(lambda: decode_video(bytes(data)), "video bytes", "damaged")
    path = write_clip(tmp_path / "cut.mkv", draw_frames(40), "libx264", "yuv420p", g="4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    one_line_error(lambda: decode_video(path), "cut.mkv", "cut off")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MediaLimits(max_pixels=56 * 56 - 1), "(max_pixels)"),
        (MediaLimits(max_seconds=2.5), "(max_seconds)"),
        (MediaLimits(max_bytes=1000), "more than 1000 bytes (max_bytes)"),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_files_beyond_the_limits_are_refused(decoder, limits, words, video_path):
    data = Path(video_path).read_bytes()
    for source in (video_path, data, io.BytesIO(data)):
        one_line_error(lambda source=source: decode_video(source, 8, decoder, limits), words)
    exact = MediaLimits(max_pixels=56 * 56, max_seconds=3, max_bytes=len(data))
    assert len(decode_video(video_path, 8, decoder, exact).frames) == 8


def test_images_beyond_the_limits_are_refused(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        one_line_error(lambda source=source: load_image(source, MediaLimits(max_pixels=1199)), "40 x 30", "max_pixels")
    one_line_error(lambda: load_image(tmp_path / "a.png", MediaLimits(max_bytes=20)), "a.png", "max_bytes")
    one_line_error(lambda: load_video([tmp_path / "a.png"] * 2, fps=1, limits=MediaLimits(max_pixels=9)), "max_pixels")
    assert load_image(tmp_path / "a.png", MediaLimits(max_pixels=1200)).shape == (30, 40, 3)


def test_transparency_is_white_and_sixteen_bits_are_scaled(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png") == 128).all()


def test_decoders_take_over_where_one_fails_for_its_own_reasons(video_path, monkeypatch):
    asked = []

    def broken(data, num_frames, limits):
        asked.append("broken")
        raise RuntimeError("no such codec")

    monkeypatch.setitem(video_gve._DECODERS, "pyav", broken)
    monkeypatch.setitem(video_gve._DECODERS, "decord", broken)
    monkeypatch.setitem(video_gve._DECODERS, "torchcodec", video_gve._with_pyav)
    assert len(decode_video(video_path).frames) == 8 and asked == ["broken", "broken"]
    one_line_error(lambda: decode_video(video_path, decoder="decord"), "square.mp4", "decord: no such codec")


def test_a_broken_file_is_not_handed_to_a_decoder_that_hides_it(tmp_path, monkeypatch):
    monkeypatch.setitem(video_gve._DECODERS, "decord", lambda *_: pytest.fail("asked"))
    (tmp_path / "page.mp4").write_bytes(b"<html>404</html>")
    one_line_error(lambda: decode_video(tmp_path / "page.mp4"), "page.mp4", "not a readable video")


def test_decoders_that_are_not_there_say_so(video_path, monkeypatch):
    monkeypatch.setattr(video_gve, "av", None)
    monkeypatch.setattr(video_gve, "decord", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    words = ("pyav: not installed: pip install av", "decord: not installed", "torchcodec: not usable here")
    one_line_error(lambda: decode_video(video_path), *words)
    with pytest.raises(ValueError, match="decoder='ffmpeg': use auto, decord, pyav, torchcodec"):
        decode_video(video_path, decoder="ffmpeg")


def test_paths_that_are_no_files_say_which(tmp_path):
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    one_line_error(lambda: decode_video(tmp_path / "circle.mp4"), "circle.mp4", "symbolic links")
    one_line_error(lambda: decode_video(tmp_path / "pipe.mp4"), "pipe.mp4", "a device or pipe")
    one_line_error(lambda: decode_video("a\0b.mp4"), "null")
    (tmp_path / "text.mp4").write_text("words")
    with open(tmp_path / "text.mp4") as file:
        one_line_error(lambda: decode_video(file), "text.mp4", 'mode "rb"')
    one_line_error(lambda: decode_video(file), "text.mp4", "cannot be read")


def test_all_forms_of_one_video_give_the_same_frames(video_path):
    data = Path(video_path).read_bytes()
    expected = decode_video(video_path)
    forms = [data, io.BytesIO(data), {"bytes": data, "path": None}, {"bytes": None, "path": video_path}, expected]
    for form in forms:
        np.testing.assert_array_equal(load_video(form).frames, expected.frames)
        np.testing.assert_allclose(load_video(form).times, expected.times)


def test_all_forms_of_bare_frames_follow_the_same_rule():
    frames, chosen = draw_frames(20), uniform_indices(20, 8)
    pictures = [Image.fromarray(frame) for frame in frames]
    for form in (frames, list(frames), pictures, frames.transpose(0, 3, 1, 2)):
        video = load_video(form, 8, fps=5)
        np.testing.assert_array_equal(video.frames, frames[chosen])
        np.testing.assert_allclose(video.times, chosen / 5)
    times = np.arange(20) ** 1.5
    np.testing.assert_allclose(load_video(frames, 8, times=times).times, times[chosen])


def test_decoders_of_datasets_are_recognised_by_their_interface():
    class Batch:
        data, pts_seconds = draw_frames(8).transpose(0, 3, 1, 2), np.arange(8) / 2

    class Decoder:
        class metadata:
            num_frames = 16

        def get_frames_at(self, indices):
            assert indices == uniform_indices(16, 8).tolist()
            return Batch

    video = load_video(Decoder())
    np.testing.assert_array_equal(video.frames, draw_frames(8))
    np.testing.assert_array_equal(video.times, np.arange(8) / 2)


def test_video_frames_are_recognised_by_their_attributes_and_stay_as_they_are():
    class Foreign:
        frames, times = draw_frames(8), np.arange(8) / 4

    assert load_video(Foreign()).frames is Foreign.frames
    assert len(load_video(VideoFrames(draw_frames(3), np.arange(3))).frames) == 8


def one_line_error(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return caught.value


def test_missing_empty_and_broken_videos_say_so_in_one_line(tmp_path, video_path):
    empty, broken, cut = tmp_path / "empty.mp4", tmp_path / "broken.mp4", tmp_path / "cut.mp4"
    empty.touch()
    broken.write_bytes(b"not a video at all" * 50)
    cut.write_bytes(Path(video_path).read_bytes()[:-400])  # the index stands at the end
    for call, words in [
        (lambda: decode_video(tmp_path / "gone.mp4"), ("gone.mp4", "no such video file")),
        (lambda: decode_video(tmp_path), ("no video file (a directory)",)),
        (lambda: decode_video(empty), ("empty.mp4", "is empty")),
        (lambda: decode_video(b""), ("video bytes", "is empty")),
        (lambda: decode_video({"bytes": b"", "path": "a.mp4"}), ("a.mp4", "is empty")),
        (lambda: decode_video(broken), ("broken.mp4", "not a readable video")),
        (lambda: decode_video(cut), ("cut.mp4", "not a readable video")),
        (lambda: decode_video(b"garbage"), ("video bytes", "not a readable video")),
        (lambda: decode_video(7), ("int", "use a path")),
        (lambda: load_video([]), ("list of frames", "empty")),
        (lambda: load_video(np.zeros((0, 4, 4, 3), np.uint8)), ("list of frames", "empty")),
        (lambda: load_video(np.zeros((8, 56, 56))), ("(8, 56, 56)", "uint8")),
        (lambda: load_video(np.zeros((8, 56, 56, 3))), ("float64", "uint8")),
        (lambda: load_video([draw_frames(1)[0], draw_frames(1, 24)[0]], 2), ("sizes differ",)),
        (lambda: load_video([tmp_path / "gone.png"]), ("list of frames", "gone.png")),
        (lambda: load_video(draw_frames(8), times=[1, 2]), ("8 frames", "2 times")),
        (lambda: load_video(draw_frames(2), times=[2, 1]), ("in order",)),
        (lambda: load_video(draw_frames(2), fps=0), ("fps=0",)),
        (lambda: load_video(draw_frames(2), fps="2"), ("fps='2'",)),
        (lambda: load_video(draw_frames(2), times=[0, None]), ("times",)),
        (lambda: load_video(draw_frames(2), fps=1, times=[1, 2]), ("both fps and times",)),
        (lambda: load_video(video_path, fps=2), ("its own clock",)),
    ]:
        assert isinstance(one_line_error(call, *words), VideoError)


def test_a_sound_file_is_no_video(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        sound.writeframes(bytes(16000))
    one_line_error(lambda: decode_video(tmp_path / "sound.wav"), "sound.wav", "no video stream")


def test_frames_without_a_clock_warn_once(caplog):
    video_gve._warn_once.cache_clear()
    for _ in range(2):
        video = sample_frames(draw_frames(8), 8)
    assert mean_spacing(video.times) == 1 / video_gve.DEFAULT_FRAMES_PER_SECOND
    assert sum("frames a second" in record.message for record in caplog.records) == 1


def test_all_forms_of_an_image(tmp_path):
    pixels = draw_frames(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [
        tmp_path / "a.png",
        data,
        io.BytesIO(data),
        {"bytes": data, "path": None},
        pixels,
        Image.fromarray(pixels),
    ]
    for form in forms:
        np.testing.assert_array_equal(load_image(form), pixels)
    assert load_image(pixels[..., 0]).shape == (56, 56, 3)
    assert load_image(Image.fromarray(pixels).convert("RGBA")).shape == (56, 56, 3)


def test_images_that_cannot_be_read_say_so_in_one_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    one_line_error(lambda: load_image(tmp_path / "gone.png"), "gone.png", "no such image file")
    one_line_error(lambda: load_image(tmp_path / "broken.png"), "broken.png", "not a readable image")
    one_line_error(lambda: load_image(b"garbage"), "image bytes", "not a readable image")
    one_line_error(lambda: load_image(np.zeros((4, 4, 5), np.uint8)), "(4, 4, 5)", "use uint8")
