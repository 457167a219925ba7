"""Reading pairs, the frame cache, and batches."""

import json

import numpy as np
import pytest
import torch
from tiny_pairs import noise_image, noise_video, row, side, write_pairs

from modeling_gve.video_gve import decode_video
from training.collate import PairCollator
from training.pairs import FrameStore, Pair, PairStream, Side, read_pairs, remove_unfinished, task_names


@pytest.fixture
def store(tmp_path, processor):
    return FrameStore(tmp_path / "cache", processor)


def test_bad_videos_are_skipped_and_counted_with_the_reason(pairs_repo, store):
    pairs, skipped = read_pairs(str(pairs_repo), "t2v", "train", store)
    assert len(pairs) == 15  # row 3 lost its target; row 5 keeps its pair and lost one negative of two
    assert [(each.row, each.side) for each in skipped] == [(3, "target"), (5, "negative 0")]
    assert all(each.task == "t2v" and "not a readable video" in each.reason for each in skipped)
    by_source = {pair.source_id: pair for pair in pairs}
    assert "film 3" not in by_source
    assert [len(by_source[f"film {index}"].negatives) for index in (4, 5, 6, 8)] == [1, 1, 0, 2]
    assert by_source["film 0"].query.text == "clip 0: red"
    assert by_source["film 0"].instruction == "Find the video."


def test_each_content_is_decoded_once_and_kept_for_the_next_run(pairs_repo, store, processor, monkeypatch):
    pairs, _ = read_pairs(str(pairs_repo), "t2v", "train", store)
    shared, _ = read_pairs(str(pairs_repo), "i2v", "train", store)
    store.seal()
    assert len(store) == 18 + 16  # 16 videos less the broken one, and again from i2v; 2 negatives; 16 images
    assert shared[0].target == pairs[0].target

    monkeypatch.setattr("training.pairs.decode_video", lambda *_: pytest.fail("decoded again"))
    again = FrameStore(store.folder.parent, processor)
    assert len(again) == len(store)
    pixels = noise_video(0)
    assert again.put([("video", pixels)]) == [(pairs[0].target.video, None)]
    assert len(list(store.folder.iterdir())) == 1


def test_frames_are_the_decoders_at_the_models_size(store):
    data = noise_video(1, height=96, width=64)
    [(key, _)] = store.put([("video", data)])
    store.seal()
    frames, times = store[key]
    assert frames.dtype == np.uint8
    assert frames.shape == (8, 56, 42, 3)  # at most 16 tokens of 14 x 14 pixels, here 4 x 3
    np.testing.assert_allclose(times, decode_video(data).times)


def test_stored_frames_give_the_inputs_of_the_original_files(store, processor):
    video, image = noise_video(2, height=112, width=80), noise_image(2, height=200, width=90)
    keys = [key for key, _ in store.put([("video", video), ("image", image)])]
    store.seal()
    collator = PairCollator(processor, store)
    sides = [(Side("what", None, keys[0]), "Find it."), (Side(None, keys[1], None), None)]
    direct = processor([{"text": "what", "video": video, "instruction": "Find it."}, {"image": image}])
    for inputs in (
        processor.collate([collator.prepare(*each) for each in sides]),
        processor([collator.item(*each) for each in sides]),
    ):
        assert inputs.keys() == direct.keys()
        assert all(torch.equal(inputs[name], direct[name]) for name in direct)


def test_interrupted_decoding_leaves_nothing(store, processor):
    store.put([("video", noise_video(3))])  # never sealed
    assert len(FrameStore(store.folder.parent, processor)) == 0
    others = store.folder.parent / ".git"  # a run_dir that holds more than a run
    others.mkdir()
    for name in (".t2v-0123456789abcdef", ".checkpoint-00000012"):
        (store.folder.parent / name).mkdir()
    (store.folder.parent / f".{'0' * 32}.tmp").touch()
    remove_unfinished(store.folder.parent)
    assert list(store.folder.iterdir()) == []
    assert sorted(store.folder.parent.iterdir()) == [others, store.folder]


def test_media_by_path_and_empty_sides(tmp_path, store):
    path = tmp_path / "clip.mp4"
    path.write_bytes(noise_video(4))
    by_path = side("a") | {"video": {"bytes": None, "path": str(path)}}
    gone_path = tmp_path / "gone.mp4"
    gone_path.write_bytes(b"here while the repo is written")
    gone = side("b") | {"video": {"bytes": None, "path": str(gone_path)}}
    rows = [
        row(side("q"), by_path),
        row(side("q"), gone),
        row(side(""), side("t")),
        row(side("q"), side("t"), [side()]),
    ]
    repo = write_pairs(tmp_path / "repo", {"t2v": rows})
    gone_path.unlink()
    pairs, skipped = read_pairs(str(repo), "t2v", "train", store)
    assert [pair.target.text for pair in pairs] == ["a", "t"], skipped
    assert [each.side for each in skipped] == ["target", "query", "negative 0"]
    assert skipped[0].reason == f"{gone_path}: No such file or directory"
    assert skipped[1].reason == "it has no text, image or video"


def test_missing_repo_split_and_columns(pairs_repo, tmp_path, store):
    with pytest.raises(ValueError, match="no training pairs at 'nowhere/at-all'"):
        task_names("nowhere/at-all")
    with pytest.raises(ValueError, match="cannot read split 'test' of task 't2v'"):
        read_pairs(str(pairs_repo), "t2v", "test", store)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"query_text": "a", "target_text": "b"}))
    with pytest.raises(ValueError, match="lacks the columns query_image"):
        read_pairs(str(folder), "default", "train", store)


def test_a_rebuilt_folder_is_read_anew(tmp_path, store):
    for number in range(2):
        repo = write_pairs(tmp_path / f"{number}/repo", {"t2t": [row(side("q"), side(f"version {number}"))]})
        pairs, _ = read_pairs(str(repo), "t2t", "train", store)
        assert pairs[0].target.text == f"version {number}"


def text_pairs(count, sources=None):
    return [
        Pair(Side(f"q{index}"), Side(f"t{index}"), (), None, None if sources is None else f"s{index % sources}")
        for index in range(count)
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one(ranks):
    pairs = text_pairs(20)  # three batches of six, and two pairs left over
    whole = PairStream("t2t", pairs, 6, 0, seed=1)
    parts = [PairStream("t2t", pairs, 6 // ranks, 0, seed=1, rank=rank, world_size=ranks) for rank in range(ranks)]
    for index in (0, 1, 2, 3, 9, 4):  # also backwards
        joined = [pair for part in parts for pair in part.batch(index)[0]]
        assert joined == whole.batch(index)[0]
        assert parts[0].batch(index)[1] == index // 3


def test_batches_have_no_false_negatives_and_use_every_pair():
    pairs = text_pairs(40, sources=10)
    stream = PairStream("t2t", pairs, 8, 0, seed=1)
    seen = set()
    for index in range(5):
        batch, number_of_pass = stream.batch(index)
        assert len({pair.source_id for pair in batch}) == 8
        seen |= {pair.query.text for pair in batch}
    assert len(seen) >= 32
    same = [Pair(Side("q"), Side(f"t{index}"), (), None, None) for index in range(9)]
    with pytest.raises(ValueError, match="task 't2t' has 9 pairs, too few distinct pairs for one batch of 4"):
        PairStream("t2t", same, 2, 0, seed=1, world_size=2).batch(0)
    assert len(PairStream("t2t", same, 4, 0, seed=1, distinct=False).batch(0)[0]) == 4


def test_hard_negatives_take_turns():
    pair = Pair(Side("q"), Side("t"), tuple(Side(str(number)) for number in range(3)), None, None)
    stream = PairStream("t2t", [pair] * 4, 2, 2, seed=1)
    chosen = ["".join(side.text for side in stream.negatives_of(0, number)) for number in range(3)]
    assert chosen == ["01", "20", "12"]
    stream.mined = {1: [Side("mined")]}
    assert [len(stream.negatives_of(row, 0)) for row in range(3)] == [2, 1, 2]  # mined ones replace the pair's own
    assert PairStream("t2t", [pair], 2, 5, seed=1).negatives_of(0, 0) == list(pair.negatives)
