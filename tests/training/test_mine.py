"""Hard negatives: the rules in small closed cases, the cache, and a run that mines; ranks in test_ranks.py."""

import json
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pairs import noise_image, noise_video, row, side, write_pairs
from tiny_runs import words_of

from training.mine import (
    Corpus,
    EmbeddingCache,
    MiningRules,
    _ShardedIndex,
    embed_all,
    give_mined,
    mine,
    mine_streams,
    read_corpus,
)
from training.pairs import FrameStore, Pair, PairStream, Side, read_pairs
from training.pyramid import main
from training.streaming import StreamedPairs


pytest.importorskip("faiss")
ONE_RANK = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)


def unit(*cosines):
    """Rows of two dimensions with these cosines to (1, 0)."""
    cosines = np.array(cosines, dtype=np.float32)
    return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)


def text_corpus(count, sources=None):
    sides = [Side(f"text {index}") for index in range(count)]
    return Corpus(sides, [set() if sources is None else {sources[index]} for index in range(count)], None, [])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (MiningRules(9, 0.0, 1.0), [2, 3, 4, 5]),  # 0.9 and 0.85 outscore the positive's 0.8
        (MiningRules(2, 0.0, 1.0), [2, 3]),
        (MiningRules(9, 0.3, 1.0), [4, 5]),
        (MiningRules(9, 0.0, 0.95), [3, 4, 5]),  # 0.78 is above 95 % of 0.8
        (MiningRules(9, 0.0, 0.5), [4, 5]),
    ],
)
def test_margins(rules, expected):
    corpus, pair = text_corpus(6), Pair(Side("q"), Side("t"), (), None, None)
    corpus_rows = unit(0.9, 0.85, 0.78, 0.7, 0.4, -0.5) * [[1, -1]]
    rows = mine([pair], corpus, unit(1.0), unit(0.8), corpus_rows.astype(np.float32), rules, ONE_RANK)
    assert rows == [expected]


def test_contents_and_sources_of_the_positive_are_no_negatives():
    corpus = text_corpus(5, ["film 0", "film 1", "film 0", "film 3", "film 4"])
    pairs = [
        Pair(Side("q"), Side("text 1"), (), None, "film 0"),
        Pair(Side("q"), Side("text 4"), (), "other instruction", None),  # the same query has another answer
    ]
    corpus_rows = unit(0.5, 0.6, 0.55, 0.4, 0.3)
    rows = mine(pairs, corpus, unit(1, 1), unit(0.9, 0.9), corpus_rows, MiningRules(9, 0, 1), ONE_RANK)
    assert rows == [[3], [2, 0, 3]]


def test_an_embedding_that_is_the_positives_is_no_negative():
    corpus, pair = text_corpus(3), Pair(Side("q"), Side("t"), (), None, None)
    positive, rows = unit(0.8), unit(0.8, 0.7, 0.6)
    query = unit(0.99999)
    assert mine([pair], corpus, query, positive, rows, MiningRules(9, 0.0, 1.0), ONE_RANK) == [[1, 2]]
    assert mine([pair], corpus, query, positive, rows, MiningRules(9, 0.0, 1.0, None), ONE_RANK) == [[0, 1, 2]]


def random_case():
    generator = np.random.default_rng(0)

    def rows(count):
        drawn = generator.normal(size=(count, 8)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    pairs = [Pair(Side(f"q{index}"), Side(f"text {index}"), (), None, None) for index in range(40)]
    corpus_rows = rows(301)
    return pairs, text_corpus(301), rows(40), corpus_rows[:40], corpus_rows


@pytest.mark.parametrize("at_once", [2**24, 200])
def test_the_best_that_fit_are_found(monkeypatch, at_once):
    """Also by searches of few queries, which is how a large corpus is looked through whole."""
    monkeypatch.setattr("training.mine.FOUND_AT_ONCE", at_once)
    search = _ShardedIndex.search

    def bounded(self, queries, depth):
        assert len(queries) * min(depth, 301) <= max(at_once, 301)
        return search(self, queries, depth)

    monkeypatch.setattr(_ShardedIndex, "search", bounded)
    pairs, corpus, queries, targets, rows = random_case()
    targets[0] = -queries[0]  # nothing lies below: the whole corpus is looked through
    scores, limits = queries @ rows.T, (queries * targets).sum(1)
    for place, found in enumerate(mine(pairs, corpus, queries, targets, rows, MiningRules(5, 0.0, 1.0), ONE_RANK)):
        fits = [each for each in np.argsort(-scores[place]) if scores[place, each] <= limits[place] and each != place]
        assert found == fits[:5]


def test_a_task_that_takes_no_negatives_is_not_mined(tmp_path):
    corpus = text_corpus(5)._replace(store=SimpleNamespace(folder=tmp_path / "frames"))
    stream = PairStream("t2t", [Pair(Side("q"), Side("t"), (), None, None)] * 2, 2, 0, seed=1)

    def embed(sides, store):
        assert {side.text[:5] for side, _ in sides} == {"text "}  # the corpus, and no pair
        return torch.ones(len(sides), 2)

    mine_streams({"t2t": stream}, corpus, embed, "prober", MiningRules(2), ONE_RANK)
    assert stream.mined == {}


def test_embeddings_are_kept_by_content(tmp_path):
    sides = [(Side(f"{index}"), None) for index in range(5)]
    embed = lambda sides: torch.tensor([[float(side.text) + 1, 1.0] for side, _ in sides])  # noqa: E731
    rows = embed_all(sides, embed, EmbeddingCache(tmp_path, "prober"), ONE_RANK)
    asked = []

    def count(sides):
        asked.extend(side.text for side, _ in sides)
        return embed(sides)

    again = embed_all([*sides, (Side("7"), None)], count, EmbeddingCache(tmp_path, "prober"), ONE_RANK)
    assert asked == ["7"]
    np.testing.assert_array_equal(again[:5], rows)
    embed_all(sides, count, EmbeddingCache(tmp_path, "another"), ONE_RANK)
    assert len(asked) == 6


def write_corpus(folder):
    """A corpus of a text, an image, a video, a composition and a broken video."""
    from datasets import Dataset, Features, Image, Value, Video

    def medium(data):
        return {"bytes": data, "path": None}

    rows = [
        {"text": "words", "image": None, "video": None, "source_id": None},
        {"text": None, "image": medium(noise_image(90)), "video": None, "source_id": None},
        {"text": None, "image": None, "video": medium(noise_video(91)), "source_id": "film 3"},
        {"text": "and", "image": medium(noise_image(92)), "video": None, "source_id": "film 4"},
        {"text": None, "image": None, "video": medium(b"broken"), "source_id": None},
    ]
    features = Features({"text": Value("string"), "image": Image(), "video": Video(), "source_id": Value("string")})
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def test_corpus_of_all_modalities(tmp_path, processor):
    corpus = read_corpus(str(write_corpus(tmp_path / "corpus")), "train", FrameStore(tmp_path / "cache", processor))
    kinds = [tuple(kind for kind, value in side._asdict().items() if value) for side in corpus.sides]
    assert kinds == [("text",), ("image",), ("video",), ("text", "image")]
    assert corpus.sources == [set(), set(), {"film 3"}, {"film 4"}]
    assert [each.row for each in corpus.skipped] == [4]
    assert corpus.store[corpus.sides[2].video].frames.shape == (8, 56, 56, 3)
    with pytest.raises(ValueError, match="no corpus at .*nothing.* as negative_corpus"):
        read_corpus(str(tmp_path / "nothing"), "train", FrameStore(tmp_path / "cache", processor))


def vectors(sides, store):
    """Random embeddings, by content alone; media must lie in the store."""
    rows = []
    for content, _ in sides:
        if content.video is not None:
            assert store[content.video].frames.ndim == 4
        generator = np.random.default_rng(zlib.crc32(repr(content).encode()))
        rows.append(generator.normal(size=8) + 1)
    return torch.tensor(np.array(rows), dtype=torch.float32)


def test_streamed_pairs_are_mined_as_those_at_hand(processor, tmp_path):
    """Also after a kill in the middle, and although a row in the middle is broken."""
    videos = [noise_video(seed) for seed in range(12)]
    videos[5] = b"broken"
    rows = [row(side(f"q{index}"), side(video=video), [side("own")]) for index, video in enumerate(videos)]
    repo = str(write_pairs(tmp_path / "pairs", {"t2v": rows}, rows_a_group=2))
    store = FrameStore(tmp_path / "cache", processor)
    pairs, _ = read_pairs(repo, "t2v", "train", store)
    corpus = read_corpus(str(write_corpus(tmp_path / "corpus")), "train", store)
    shape = {"batch_size": 3, "hard_negatives": 9, "seed": 1}
    streamed = StreamedPairs(
        repo, "t2v", "train", root=tmp_path / "windows", processor=processor, window_pairs=4, **shape
    )
    at_hand = PairStream("t2v", pairs, **shape, store=store)
    rules = MiningRules(3, 0.0, 1.0)
    mine_streams({"t2v": at_hand}, corpus, vectors, "prober", rules, ONE_RANK)
    expected = {pair.query: at_hand.negatives_of(place, 0) for place, pair in enumerate(pairs)}
    assert {len(sides) for sides in expected.values()} >= {1, 3}  # also its own, where none is found

    def interrupted(sides, store):
        if any(side[0].text == "q7" for side in sides):
            raise KeyboardInterrupt
        return vectors(sides, store)

    with pytest.raises(KeyboardInterrupt):
        mine_streams({"t2v": streamed}, corpus, interrupted, "prober", rules, ONE_RANK)
    [folder] = (tmp_path / "cache/mined").iterdir()
    finished = len(list(folder.glob("*.npz")))
    asked = []
    mine_streams(
        {"t2v": streamed}, corpus, lambda *a, **k: asked.append(1) or vectors(*a, **k), "prober", rules, ONE_RANK
    )
    assert len(list(folder.glob("*.npz"))) == finished + len(asked) == 3
    for index in range(8):
        drawn = streamed.draw(index)
        for pair, negatives in zip(drawn.pairs, drawn.negatives, strict=True):
            assert set(negatives) == set(expected[pair.query])
            keys = [key for each in (pair.target, *negatives) for key in (each.image, each.video) if key]
            assert all(drawn.store[key].frames.size for key in keys)  # of the window and of the corpus

    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="mined negatives are missing at .*: set overwrite to start anew"):
        give_mined(streamed, corpus, folder.name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_mines_and_resumes_with_what_it_mined(recipe, tmp_path, capsys, streaming):
    corpus = write_corpus(tmp_path / "corpus")
    words = ["--negative_corpus", str(corpus), "--mine_relative_margin", "1", "--mine_every_epoch", "--epochs", "2"]
    words += ["--hard_negatives", "2", "--steps_per_epoch", "2", "--save_steps", "1", "--save_total_limit", "9"]
    words += ["--streaming", "--window_pairs", "8"] if streaming else []
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main_words = words_of(recipe, whole, *words)
    main(main_words)
    progress = json.loads((whole / "run/checkpoint-00000003/progress.json").read_text())
    assert any(progress["mined"].values())
    (resumed / "run").mkdir(parents=True)
    for name in ("cache", "checkpoint-00000003"):
        (whole / "run" / name).rename(resumed / "run" / name)
    capsys.readouterr()
    main(words_of(recipe, resumed, *words))
    assert "resuming from" in capsys.readouterr().out
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_embeddings_of_other_frames_are_not_taken_from_the_cache(recipe, tmp_path):
    """Same weights, same files, same run_dir, but other frames of each video."""
    words = ["--negative_corpus", str(write_corpus(tmp_path / "corpus")), "--epochs", "1", "--steps_per_epoch", "1"]
    for frames in ("8", "2"):
        main(words_of(recipe, tmp_path / "out", *words, "--num_frames", frames, "--overwrite"))
    first, second = (tmp_path / "out/run/cache/embeddings").iterdir()
    first, second = EmbeddingCache(first.parent, first.name), EmbeddingCache(second.parent, second.name)
    assert first._rows.keys() == second._rows.keys()
    assert any((first._rows[key] != second._rows[key]).any() for key in first._rows)
