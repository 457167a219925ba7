"""Windows of sharded files: an order that is exact on every rank, worker and resumption, and little on disk."""

import json

import pytest
from test_pairs import text_pairs
from tiny_pairs import noise_video, row, side, write_pairs
from tiny_runs import words_of

from training.collate import PairCollator
from training.loader import load_batches
from training.pairs import PairStream
from training.pyramid import main
from training.streaming import StreamedPairs, row_groups, skipped_sides


ROWS, GROUP = 40, 4


@pytest.fixture(scope="module")
def sharded_repo(tmp_path_factory):
    """40 pairs of t2v in ten row groups, of which row 7 is broken, and 40 of t2t."""
    videos = [noise_video(seed) for seed in range(ROWS)]
    videos[7] = b"broken"
    rows = {
        "t2v": [row(side(f"q{index}"), side(video=video), [], "Find it.") for index, video in enumerate(videos)],
        "t2t": [row(side(f"q{index}"), side(f"t{index}"), [side(f"n{index}")]) for index in range(ROWS)],
    }
    return write_pairs(tmp_path_factory.mktemp("sharded"), rows, rows_a_group=GROUP)


@pytest.fixture
def stream(sharded_repo, processor, tmp_path):
    def make(task="t2t", batch_size=3, **extra):
        settings = {"hard_negatives": 1, "seed": 1, "root": tmp_path / "windows", "window_pairs": 10}
        return StreamedPairs(str(sharded_repo), task, "train", batch_size, processor=processor, **settings | extra)

    return make


def queries(drawn):
    return [pair.query.text for pair in drawn.pairs]


def test_row_groups_know_their_rows(sharded_repo):
    groups = row_groups(str(sharded_repo), "t2t", "train")
    assert [(group, first, rows) for _, group, first, rows in groups] == [(n, n * GROUP, GROUP) for n in range(10)]
    assert [rows for *_, rows in row_groups(str(sharded_repo), "t2t", "train", max_pairs=9)] == [4, 4, 1]
    with pytest.raises(ValueError, match="cannot read split 'test' of task 't2t'"):
        row_groups(str(sharded_repo), "t2t", "test")


def test_a_pass_uses_pairs_once_and_each_pass_another_order(stream):
    whole = stream()
    assert len(whole) == ROWS
    # Windows of 12 rows (three groups), the last of 4: 4 + 4 + 4 + 1 batches of 3.
    passes = [[query for index in range(13) for query in queries(whole.draw(first + index))] for first in (0, 13)]
    assert all(len(set(drawn)) == 39 for drawn in passes)
    assert passes[0] != passes[1]
    assert whole.draw(13).cursor["pass"] == 1
    drawn = whole.draw(0)  # backwards
    assert queries(drawn) == passes[0][:3]
    assert [[side.text for side in sides] for sides in drawn.negatives] == [[f"n{q[1:]}"] for q in queries(drawn)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one(stream, ranks):
    parts = [stream(batch_size=6 // ranks, rank=rank, world_size=ranks) for rank in range(ranks)]
    whole = stream(batch_size=6)
    for index in range(8):
        assert [query for part in parts for query in queries(part.draw(index))] == queries(whole.draw(index))


def test_a_cursor_resumes_without_reading_what_lies_before(stream, tmp_path):
    whole = stream()
    expected = [queries(whole.draw(index)) for index in range(20)]
    cursor = json.loads(json.dumps(whole.draw(14).cursor))
    resumed = stream(root=tmp_path / "elsewhere")
    resumed.seek(cursor)
    assert [queries(resumed.draw(index)) for index in range(14, 20)] == expected[14:]
    made = len(list((tmp_path / "elsewhere").glob("t2t-*")))
    assert made <= 3
    assert queries(resumed.draw(2)) == expected[2]


def test_windows_are_few_on_disk_and_say_what_they_skip(stream, tmp_path):
    videos = stream("t2v", batch_size=3)
    seen = set()
    for index in range(12):
        drawn = videos.draw(index)
        seen |= set(queries(drawn))
        assert all(drawn.store[pair.target.video].frames.shape == (8, 56, 56, 3) for pair in drawn.pairs)
        assert len(list((tmp_path / "windows").glob("t2v-*"))) <= 2
    assert "q7" not in seen
    [(task, number, name, reason)] = skipped_sides(tmp_path / "windows")
    assert (task, number, name) == ("t2v", 7, "target")
    assert "not a readable video" in reason
    pairs, store = videos.probe_pairs(5, seed=0)
    assert len(pairs) == 5 and all(pair.target.video in store for pair in pairs)


def test_windows_of_other_processes_go_too(stream, tmp_path):
    """Those of a loader's workers, of ranks, of a run that was killed, also in the middle of deleting one."""
    whole, windows = stream(root=tmp_path / "elsewhere"), tmp_path / "windows"
    for index in (0, 5, 10):
        process = stream()
        process.seek(whole.draw(index).cursor)
        process.draw(index)
    assert len(list(windows.glob("t2t-*"))) == 2
    for window in windows.glob("t2t-*"):
        window.rename(window.with_name(f".{window.name}"))  # as deletion begins
    assert queries(stream().draw(0)) == queries(whole.draw(0))


def test_too_few_pairs_for_a_batch(stream):
    with pytest.raises(ValueError, match="task 't2t' has 40 pairs, too few distinct pairs for one batch of 13"):
        stream(batch_size=13).draw(0)


def test_batches_do_not_depend_on_the_number_of_workers(processor):
    collator = PairCollator(processor)
    plan = [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]
    batches = []
    for workers in (0, 2):
        streams = {task: PairStream(task, text_pairs(12), 4, 0, seed=1) for task in "ab"}
        batches.append([batch for batch, _ in load_batches(collator, streams, plan, 3, workers)])
    for one, other in zip(*batches, strict=True):
        assert one.places.equal(other.places) and len(one.groups) == len(other.groups) >= 3
        for mine, theirs in zip(one.groups, other.groups):
            assert all(mine[name].equal(theirs[name]) for name in mine)


def test_workers_of_a_later_epoch_start_where_the_last_one_ended(recipe, sharded_repo, tmp_path, monkeypatch):
    """They inherit this process's streams, which drew nothing, and once read all windows since the start."""
    made, make = tmp_path / "made", StreamedPairs._make_window

    def noted(self, groups, folder):
        with open(made, "a") as file:
            file.write(f"{folder.name}\n")
        make(self, groups, folder)

    monkeypatch.setattr(StreamedPairs, "_make_window", noted)
    words = ["--pairs", str(sharded_repo), "--tasks", "t2t", "--task_hard_negatives", "t2t=1", "--streaming"]
    words += ["--window_pairs", "8", "--epochs", "3", "--steps_per_epoch", "9", "--loader_workers", "1"]
    main(words_of(recipe, tmp_path / "out", *words))
    # 27 batches of 4 are 13 windows of 8 pairs and a half; each later epoch's probe brings the first one back.
    assert len(made.read_text().split()) <= 14 + 2
    assert len(list((tmp_path / "out/run/cache/windows").glob("t2t-*"))) == 2


def test_a_streamed_run_resumes_to_the_same_weights(recipe, sharded_repo, tmp_path, capsys):
    words = ["--pairs", str(sharded_repo), "--tasks", "t2t", "t2v", "--streaming", "--window_pairs", "10"]
    words += ["--epochs", "2", "--steps_per_epoch", "5", "--save_steps", "1", "--save_total_limit", "20"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main(words_of(recipe, whole, *words))
    (resumed / "run").mkdir(parents=True)
    (whole / "run/checkpoint-00000007").rename(resumed / "run/checkpoint-00000007")
    capsys.readouterr()
    main(words_of(recipe, resumed, *words))
    assert "resuming from" in capsys.readouterr().out
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert json.loads((resumed / "training_run.json").read_text())["data"]["skipped"] <= 1
