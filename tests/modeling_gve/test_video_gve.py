"""Reading videos and images: uniform frames, real clocks, every accepted form, and messages of what cannot be read."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rendering import draw_frames, write_video

from modeling_gve import VideoError, VideoFrames, decode_video, video_gve
from modeling_gve.video_gve import load_image, load_video, mean_spacing, sample_frames, uniform_indices


DECODERS = [video_gve._with_decord, video_gve._with_pyav]


def test_uniform_indices_include_both_ends_and_repeat_frames_of_short_clips():
    assert uniform_indices(8, 8).tolist() == list(range(8))
    assert uniform_indices(300, 8)[[0, -1]].tolist() == [0, 299]
    assert np.ptp(np.diff(uniform_indices(300, 8))) <= 1
    assert uniform_indices(3, 8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert uniform_indices(1, 8).tolist() == [0] * 8


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_agree_on_pixels_and_times(decoder, video_path, monkeypatch):
    monkeypatch.setattr(video_gve, "_DECODERS", [decoder])
    for source in (video_path, Path(video_path).read_bytes()):
        video = decode_video(source)
        chosen = uniform_indices(24, 8)
        assert video.frames.shape == (8, 56, 56, 3) and video.frames.dtype == np.uint8
        np.testing.assert_allclose(video.times, chosen / 8, atol=1e-6)
        assert np.abs(video.frames.astype(int) - draw_frames(24)[chosen]).mean() < 8  # lossy, but the right frames
        np.testing.assert_array_equal(video.frames, decode_video(video_path).frames)


@pytest.mark.parametrize("decoder", DECODERS)
def test_presentation_times_of_an_uneven_clock_are_kept(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(video_gve, "_DECODERS", [decoder])
    times = [0, 500, 1000, 2000, 4000, 4500, 6000, 9000]
    path = write_video(tmp_path / "uneven.mp4", draw_frames(8), times=times)
    np.testing.assert_allclose(decode_video(path).times, np.array(times) / 1000, atol=2e-3)
    assert mean_spacing(decode_video(path).times) == pytest.approx(9 / 7, abs=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_short_clip_repeats_its_frames(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(video_gve, "_DECODERS", [decoder])
    video = decode_video(write_video(tmp_path / "short.mp4", draw_frames(2), fps=4))
    assert len(video.frames) == 8 and (video.frames[0] == video.frames[3]).all()
    np.testing.assert_allclose(video.times, [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25], atol=1e-6)


def test_pyav_takes_over_where_decord_fails(video_path, monkeypatch):
    def broken(data, num_frames):
        raise RuntimeError("no such codec")

    monkeypatch.setattr(video_gve, "_DECODERS", [broken, video_gve._with_pyav])
    assert len(decode_video(video_path).frames) == 8


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
        (lambda: decode_video(tmp_path), ("no such video file",)),
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
