"""UVRB from small files in the upstream datasets' own layouts."""

import csv
import json

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from release_tree import put, write_lines
from rendering import draw_frames

from dataset_builders.mini.render import encode_mp4
from dataset_builders.uvrb.build import check
from dataset_builders.uvrb.sources import SourceError
from dataset_builders.uvrb.tasks import TASKS
from dataset_builders.uvrb.upstream import NEEDS, UPSTREAM_CLASSES, open_upstream


@pytest.fixture(scope="module")
def clip():
    return encode_mp4(draw_frames(10))


def opened(root, key, **places):
    (root / "sources.yaml").write_text(yaml.safe_dump({key: places}))
    (task,) = open_upstream(root / "sources.yaml")
    return task.read()


def videos(root, names, clip, folder="videos"):
    for name in names:
        put(root / folder / name, clip)


def ids(items):
    return [item.id for item in items]


def test_every_dataset_has_a_class():
    assert list(UPSTREAM_CLASSES) == list(TASKS)


def write_msrvtt(root, clip):
    with open(root / "MSRVTT_JSFUSION_test.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "vid_key", "video_id", "sentence"])
        rows.writerow(["ret0", "msr9770", "video9770", "a person, connecting something"])
        rows.writerow(["ret1", "msr9771", "video9771", "a little girl does gymnastics"])
    videos(root, ["video9770.mp4", "video9771.mp4"], clip)
    return {"annotations": "MSRVTT_JSFUSION_test.csv", "videos": "videos"}


def test_msrvtt_and_its_frames(tmp_path, clip):
    places = write_msrvtt(tmp_path, clip)
    read = opened(tmp_path, "msrvtt", **places)
    assert [(item.id, item.text) for item in read.queries][0] == ("ret0", "a person, connecting something")
    assert ids(read.corpus) == ["video9770", "video9771"] and read.positives["ret1"] == ["video9771"]
    places = {"msrvtt_i2v": places}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(places))
    (dataset,), prepared, report = check(open_upstream(tmp_path / "both.yaml"), tmp_path / "cache", clips=False)
    assert report["problems"] == [] and dataset.relevant == {name: [name] for name in ("video9770", "video9771")}
    drawn = [prepared[item.image] for item in dataset.queries]
    assert [done.action for done in drawn] == ["draw frame"] * 2 and drawn[0].file.endswith(".png")


def test_didemo_joins_the_sentences_of_a_video(tmp_path, clip):
    rows = [
        {"annotation_id": 1, "video": "1@N00_2.mov", "description": "camera pans ", "times": [[0, 0]]},
        {"annotation_id": 2, "video": "3@N00_4.avi", "description": "a dog runs", "times": [[1, 1]]},
        {"annotation_id": 3, "video": "1@N00_2.mov", "description": "a man waves", "times": [[2, 3]]},
    ]
    (tmp_path / "test_data.json").write_text(json.dumps(rows))
    videos(tmp_path, ["1@N00_2.mp4", "3@N00_4.avi"], clip)  # the endings often differ between mirrors
    read = opened(tmp_path, "didemo", annotations="test_data.json", videos="videos")
    assert [(item.id, item.text) for item in read.queries] == [
        ("1@N00_2", "camera pans a man waves"),
        ("3@N00_4", "a dog runs"),
    ]
    assert ids(read.corpus) == ["1@N00_2", "3@N00_4"] and read.problems == []


@pytest.mark.parametrize("key", ["crb_g", "crb_s", "crb_t"])
def test_carebench(tmp_path, clip, key):
    row = {"video": "a.mp4", "caption": "all", "spatial_caption": "where", "temporal_caption": "when"}
    (tmp_path / "metadata.json").write_text(json.dumps([row]))
    videos(tmp_path, ["a.mp4"], clip)
    read = opened(tmp_path, key, annotations="metadata.json", videos="videos")
    assert read.queries[0].text == {"crb_g": "all", "crb_s": "where", "crb_t": "when"}[key]


@pytest.mark.parametrize("key", ["vdc_o", "vdc_d"])
def test_vdc_with_sub_folders(tmp_path, clip, key):
    row = {"video_id": "x", "video_name": "pexels-1.mp4", "main_object_caption": "a cat", "detailed_caption": "long"}
    write_lines(tmp_path / "VDC_1k.jsonl", [row, {"video_name": "lost.mp4", "main_object_caption": "?"}])
    videos(tmp_path, ["Pexels/pexels-1.mp4"], clip)
    read = opened(tmp_path, key, annotations="VDC_1k.jsonl", videos="videos")
    assert read.queries[0].text == {"vdc_o": "a cat", "vdc_d": "long"}[key]
    assert read.corpus[0].video.name == "Pexels/pexels-1.mp4"
    assert [(problem.side, problem.id) for problem in read.problems] == [("corpus", "lost")]


def test_equal_texts_are_one_query(tmp_path, clip):
    rows = [
        {"path": "videos/a.0.mp4", "caption": "a pan", "labels": ["pan-left"]},
        {"path": "videos/b.1.mp4", "caption": "a pan", "labels": ["pan-left"]},
        {"path": "videos/c.2.mp4", "caption": "", "labels": []},
    ]
    write_lines(tmp_path / "test.jsonl", rows)
    videos(tmp_path, ["a.0.mp4", "b.1.mp4", "c.2.mp4"], clip)
    read = opened(tmp_path, "cmrb", annotations="test.jsonl", videos="videos")
    assert ids(read.queries) == ["videos/a.0"] and len(read.corpus) == 3
    assert read.positives == {"videos/a.0": ["videos/a.0", "videos/b.1"]}


def test_dream_has_a_query_an_event(tmp_path, clip):
    rows = [
        {"vid": 1, "idx": 1, "extra_info": {"events": ["a man sits.", "a door opens."]}},
        {"vid": 2, "idx": 2, "extra_info": {"events": ["a door opens."]}},
    ]
    write_lines(tmp_path / "DREAM-1k.jsonl", rows)
    videos(tmp_path, ["1.mp4", "2.mp4"], clip)
    read = opened(tmp_path, "dream_e", annotations="DREAM-1k.jsonl", videos="videos")
    assert [(item.id, item.text) for item in read.queries] == [("1-0", "a man sits."), ("1-1", "a door opens.")]
    assert read.positives == {"1-0": ["1"], "1-1": ["1", "2"]}


def test_lovr_in_its_three_shapes(tmp_path, clip):
    write_lines(tmp_path / "theme.jsonl", [{"vid": "-x-Scene-001", "cap": "a theme"}])
    parquet.write_table(pa.table({"vid": ["-x"], "cap": ["a long caption"]}), tmp_path / "video_test.parquet")
    videos(tmp_path, ["-x/-x-Scene-001.mp4", "-x/-x-Scene-002.mp4", "y/y-Scene-001.mp4"], clip, "clips")
    videos(tmp_path, ["-x.mp4", "y.mp4"], clip, "full")
    read = opened(tmp_path, "lovr_th", annotations="theme.jsonl", videos="clips")
    assert read.positives == {"-x-Scene-001": ["-x-Scene-001"]} and read.corpus[0].video.path.is_file()
    read = opened(tmp_path, "lovr_v", annotations="video_test.parquet", videos="full")
    assert ids(read.queries) == ["-x"] and ids(read.corpus) == ["-x", "y"]
    read = opened(tmp_path, "lovr_c2v", videos="full", clips="clips")
    assert ids(read.queries) == ids(read.corpus) == ["-x", "y"]
    assert read.queries[0].video.name.startswith("-x/-x-Scene-00")
    assert read == opened(tmp_path, "lovr_c2v", videos="full", clips="clips")


def test_pe_video(tmp_path, clip):
    put(tmp_path / "test/12.json", json.dumps({"keywords": ["dog", "beach"], "human_caption": "x"}).encode())
    put(tmp_path / "test/13.json", json.dumps({"keywords": "cat, sofa"}).encode())
    put(tmp_path / "test/14.json", json.dumps({"human_caption": "x"}).encode())
    videos(tmp_path, ["12.mp4", "13.mp4", "14.mp4"], clip, "test")
    read = opened(tmp_path, "pev_k", annotations="test", videos="test")
    assert [(item.id, item.text) for item in read.queries] == [("12", "dog, beach"), ("13", "cat, sofa")]
    assert ids(read.corpus) == ["12", "13", "14"]


@pytest.mark.parametrize("key", ["ms_ti", "ms_tv"])
def test_moment_seeker_ranks_a_list_of_its_own(tmp_path, clip, key):
    def row(shown, number):
        frames = {"positive_frames": [number], "negative_frames": [number + 1, number + 2]}
        clips = {name: [{"output_path": f"movie/{n}.mp4"} for n in numbers] for name, numbers in frames.items()}
        return {"query": f"find {number}", "input_frames": shown, **clips}

    write_lines(tmp_path / "ms.jsonl", [row("7.jpg", 1), row("movie/8.mp4", 2), row("", 3)])
    videos(tmp_path, [f"movie/{n}.mp4" for n in (1, 2, 3, 4, 8)], clip)
    put(tmp_path / "images/query_7.jpg", b"a picture")
    read = opened(tmp_path, key, annotations="ms.jsonl", videos="videos", images="images")
    (query,) = read.queries
    number = {"ms_ti": 1, "ms_tv": 2}[key]
    assert query.text == f"find {number}" and (query.image or query.video).path.is_file()
    assert read.positives == {query.id: [f"movie/{number}"]}
    assert read.candidates == {query.id: [f"movie/{number + step}" for step in range(3)]}


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"msrvtt": {"videos": "."}}, "msrvtt needs annotations"),
        ({"lovr_c2v": {"videos": "."}}, "lovr_c2v needs clips"),
        ({"msrvtt": {"videos": "none", "annotations": "a.csv"}}, "no videos at"),
        ({"msvd": {"videos": "."}}, "names 'msvd'"),
        (["msrvtt"], "names 'no mapping'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, entry, said):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(entry))
    with pytest.raises(SourceError, match=said):
        open_upstream(tmp_path / "sources.yaml")
    assert set(NEEDS) <= set(TASKS)


def test_a_column_that_is_not_there_is_named(tmp_path, clip):
    (tmp_path / "a.csv").write_text("id,caption\n1,x\n")
    videos(tmp_path, ["1.mp4"], clip)
    with pytest.raises(SourceError, match="a row without 'key'; it has id, caption"):
        opened(tmp_path, "msrvtt", annotations="a.csv", videos="videos")
