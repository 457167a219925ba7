"""Classification as retrieval, and a clip against its own reversal."""

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value, Video
from rendering import draw_frames
from tiny_benchmark import media

from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.diagnostics import clip_sides, load_classification, reverse_frames, score_reverse_time
from evaluate_metrics.retrieval_data import UvrbError, load_retrieval_data
from evaluate_metrics.run_uvrb import RunArguments, run
from modeling_gve.video_gve import VideoFrames


def write_classes(folder, label, labels, columns=("video", "label")):
    """A set of stub clips: `labels` maps their numbers to labels."""
    rows = [{"video": media("clip", number), "label": each} for number, each in labels.items()]
    rows = Dataset.from_list(rows, features=Features({"video": Video(), "label": label})).select_columns(list(columns))
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "test.parquet")
    config = {"config_name": "default", "data_files": [{"split": "test", "path": "test.parquet"}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")
    return str(folder)


@pytest.mark.parametrize("typed", [True, False])
def test_classes_are_found_among_their_labels(benchmark, stub, stub_log, tmp_path, typed):
    """The stub knows clip n and "class n" by their number, modulo 12; clip 4 carries a wrong label."""
    names = [f"class_{number}" for number in range(5)]
    labels = {**dict(enumerate(names)), 4: "class_0", 16: "class_4"}
    kind = ClassLabel(names=names[::-1]) if typed else Value("string")
    actions = write_classes(tmp_path / "actions", kind, labels)
    args = RunArguments(stub, benchmark, str(tmp_path / "out"), ["msrvtt"], ["random"], classification=[actions])
    models = run(args)["models"]
    entry = models[0]["classification"]["actions"]
    assert entry["score"] == pytest.approx(5 / 6) and entry["chance"] == pytest.approx(1 / 5)
    assert (entry["n_queries"], entry["n_corpus"]) == (6, 5)
    assert "actions" not in models[0]["datasets"] and models[0]["abilities"]["missing_datasets"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## Classification as video-to-label retrieval" in text and "| actions | accuracy |" in text
    assert "Find the label" in stub_log.read_text()


def test_a_set_without_its_columns_is_named(tmp_path):
    folder = write_classes(tmp_path / "set", Value("string"), {0: "a"}, columns=["video"])
    with pytest.raises(UvrbError, match="lacks label; give video and label"):
        load_classification(folder)


def test_a_name_that_is_taken_is_refused(benchmark, stub, stub_log, tmp_path):
    folder = write_classes(tmp_path / "msrvtt", Value("string"), {0: "a"})
    with pytest.raises(UvrbError, match="Two datasets are called msrvtt"):
        run(RunArguments(stub, benchmark, str(tmp_path / "out"), ["msrvtt"], classification=[folder]))


def test_reversal_keeps_the_span_and_the_gaps():
    video = VideoFrames(draw_frames(4), np.array([1.0, 1.5, 3.0, 3.25]))
    backwards = reverse_frames(video)
    assert (backwards.frames == video.frames[::-1]).all()
    assert backwards.times.tolist() == [1.0, 1.25, 2.75, 3.25]  # the gaps in reverse order
    again = reverse_frames(backwards)
    assert (again.frames == video.frames).all() and again.times.tolist() == video.times.tolist()


def test_each_query_meets_its_own_clip(benchmark):
    data = load_retrieval_data(benchmark, TASKS["crb_t"])
    forward, reversed_, rows = clip_sides(data, 8)
    assert [forward.ids[row] for row in rows] == [data.relevant[name][0] for name in data.queries.ids]
    assert forward.ids == reversed_.ids and not set(forward.digests) & set(reversed_.digests)
    assert not set(forward.digests) & set(clip_sides(data, 4)[0].digests)


def test_preference_closed_forms():
    """Query 0 prefers its clip, 1 the reversal, 2 neither, 3 has no vector."""
    queries = np.array([[1, 0], [1, 0], [1, 0], [np.nan, 0]], dtype=np.float32)
    forward = np.array([[1, 0], [0, 1], [3, 4]], dtype=np.float32)
    backward = np.array([[0, 1], [1, 0], [6, 8]], dtype=np.float32)
    result = score_reverse_time(queries, forward, backward, np.array([0, 1, 2, 0]))
    assert result["preferred"] == 0.5 and result["mean_margin"] == pytest.approx(0)
    assert (result["n_queries"], result["n_skipped"]) == (3, 1)
    assert score_reverse_time(queries[:1], forward, backward, np.array([0]))["preferred"] == 1.0
    with pytest.raises(UvrbError, match="No query of the reverse-time diagnostic"):
        score_reverse_time(queries[3:], forward, backward, np.array([0]))
