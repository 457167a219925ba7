"""Looking at videos and cutting them."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from dataset_builders.mini.render import encode_mp4, render
from dataset_builders.synflow.footage import (
    FootageError,
    clip_spans,
    cut_clip,
    frame_times,
    look_at,
    motion,
    read_frames,
    shots,
    signature,
)
from dataset_builders.synflow.quality import SignatureIndex
from dataset_builders.synflow.recipe import Cutting, Duplicates, VideoQuality
from dataset_builders.synflow.rendered import draw_film


LIMITS = VideoQuality(min_side=32)


def moving(colour, count=16, side=64, step=2):
    """A square that moves to the right before one colour."""
    frames = np.empty((count, side, side, 3), np.uint8)
    frames[:] = colour
    for k, frame in enumerate(frames):
        frame[20:40, 4 + step * k : 24 + step * k] = 255 - np.array(colour, np.uint8)
    return frames


@pytest.fixture(scope="module")
def video():
    return encode_mp4(moving((200, 40, 40)))


@pytest.fixture(scope="module")
def two_shots():
    return encode_mp4(np.concatenate([moving((200, 40, 40), 12), moving((20, 40, 160), 9, step=-1)]))


def test_a_video_is_measured(video):
    footage = look_at(video, LIMITS)
    assert (footage.width, footage.height) == (64, 64)
    assert footage.seconds == pytest.approx(16 / 6)
    assert np.allclose(footage.times, np.arange(16) / 6)
    assert footage.thumbnails.shape == (16, 64, 64, 3)


@pytest.mark.parametrize(
    "data, limits, reason",
    [
        (b"no video at all", {}, "video_unreadable"),
        (None, {"min_seconds": 5}, "video_too_short"),
        (None, {"max_seconds": 2}, "video_too_long"),
        (None, {"min_side": 100}, "video_too_small"),
        (None, {"max_side": 50}, "video_too_large"),
    ],
)
def test_what_is_out_of_bounds_is_dropped_for_its_reason(video, data, limits, reason):
    with pytest.raises(FootageError) as caught:
        look_at(data or video, VideoQuality(**{"min_side": 32, **limits}))
    assert caught.value.reason == reason


def test_a_cut_off_file_is_unreadable(video):
    with pytest.raises(FootageError) as caught:
        look_at(video[: len(video) // 2], LIMITS)
    assert caught.value.reason == "video_unreadable"


def test_still_pictures_do_not_move(video):
    still = encode_mp4(np.repeat(moving((200, 40, 40), 1), 16, axis=0))
    assert motion(look_at(still, LIMITS)) < 3 < 50 < motion(look_at(video, LIMITS))


def test_shots_are_told_by_their_cuts(video, two_shots):
    assert shots(look_at(video, LIMITS), Cutting()) == [(0.0, pytest.approx(16 / 6))]
    first, second = shots(look_at(two_shots, LIMITS), Cutting())
    assert first == (0.0, 2.0) and second == (2.0, pytest.approx(3.5))


def test_a_second_upload_is_a_near_duplicate_and_another_video_is_none(video):
    smaller = [np.asarray(Image.fromarray(f).resize((56, 56))) for f in moving((200, 40, 40))]
    index = SignatureIndex(Duplicates())
    index.add("original", signature(look_at(video, LIMITS)).ravel())
    assert index.find(signature(look_at(encode_mp4(np.stack(smaller)), LIMITS)).ravel()) == "original"
    other = encode_mp4(moving((20, 160, 40))[::-1])
    assert index.find(signature(look_at(other, LIMITS)).ravel()) is None


def test_the_index_finds_what_a_comparison_with_all_finds():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (50, 128), dtype=np.uint8)
    index = SignatureIndex(Duplicates())
    for number, row in enumerate(rows):
        index.add(number, row)
    places = np.arange(1024).reshape(8, 128)
    luma, colour = places[:, :64].ravel(), places[:, 64:].ravel()
    for number, row in enumerate(rows):
        bits = np.unpackbits(row)
        bits[rng.permutation(luma)[:24]] ^= 1
        bits[rng.permutation(colour)[:106]] ^= 1
        assert index.find(np.packbits(bits)) == number
        for kind, count in ((luma, 25), (colour, 131)):
            other = np.unpackbits(row)
            other[rng.permutation(kind)[:count]] ^= 1
            assert index.find(np.packbits(other)) is None


def test_frames_are_those_shown_at_the_time(video):
    with av.open(io.BytesIO(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    late, early = read_frames(video, [2.01, 0.0])
    assert (early == frames[0]).all() and (late == frames[12]).all()


def test_a_clip_holds_its_span_and_is_the_same_twice(two_shots):
    clip = cut_clip(two_shots, 2.0, 3.5)
    assert clip == cut_clip(two_shots, 2.0, 3.5)
    footage = look_at(clip, LIMITS)
    assert footage.seconds == pytest.approx(1.5) and footage.times[0] == 0
    whole = look_at(two_shots, LIMITS).thumbnails[12:].astype(int)
    assert np.abs(footage.thumbnails.astype(int) - whole).mean() < 4


def test_encoding_again_gives_the_same_bytes():
    """Of a film that x264's AVX-512 code encodes differently from one time to the next."""
    frames, files, clips = render(draw_film(5, 1)), set(), set()
    for k in range(6):
        files.add(encode_mp4(frames))
        clips.add(cut_clip(max(files), 0.5, 3.0))
        held = [np.ones(500 * k + n) for n in range(30)]  # other memory comes next
    assert len(files) == len(clips) == 1 and held


def test_stills_and_clips_come_from_the_longest_shots():
    spans = [(0.0, 1.0), (1.0, 4.0)]
    assert frame_times(spans, 3) == [2.5, 0.5, 1.6]
    assert clip_spans(spans, 4.0, 1, 1.0) == [(1.0, 4.0)]
    assert clip_spans([(0.0, 4.0)], 4.0, 1, 1.0) == [(1.0, 3.0)]
    assert clip_spans([(0.0, 4.0)], 4.0, 3, 1.0) == [(1.0, 3.0), (0.0, 2.0), (2.0, 4.0)]
    assert clip_spans([(0.0, 1.0)], 1.0, 3, 1.0) == [(0.0, 1.0)]
    # Ten stills of the shortest scene (14 frames at 6 a second) are ten different frames.
    assert len({int(6 * time) for time in frame_times([(0.0, 14 / 6)], 10)}) == 10
    with pytest.raises(FootageError, match="no frame"):
        cut_clip(encode_mp4(moving((9, 9, 9))), 8, 9)
