"""The rendered world: the benchmark is honest, training never sees it, and the same seed gives the same bytes."""

import io

import av
import numpy as np
import pytest

from dataset_builders.mini import benchmark as mini_benchmark
from dataset_builders.mini import builders, pairs
from dataset_builders.mini.__main__ import build, main
from dataset_builders.mini.benchmark import CORPUS_OF, build_benchmark
from dataset_builders.mini.edits import draw_family
from dataset_builders.mini.oracle import FrameQuestion, relevant
from dataset_builders.mini.render import SIDE, encode_mp4, render, render_mp4
from dataset_builders.mini.texts import STYLES_OF_TEXT, describe, facts_of, holds
from dataset_builders.mini.world import FPS, Event, Film, Scene, Thing, change, draw_scene, generator
from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.uvrb_retrieval.ranking import mean_scores, ranks_from_embeddings


@pytest.fixture(scope="session")
def world():
    return build_benchmark(seed=0)


def one_thing(**settings):
    thing = Thing("red", "square", "large", "solid", 1, 1, 1)
    scene = {"theme": "city", "style": "bright", "things": (thing,), "events": (), "camera": ("static", "static")}
    return Scene(**{**scene, "frames": 16, "seed": 7, **settings})


def test_every_dataset_has_its_shape(world):
    corpora, queries = world
    assert set(queries) == set(TASKS)
    for key, asked in queries.items():
        films = corpora[CORPUS_OF[key]].films
        assert len(asked) >= 200 and len(films) >= 200
        modality = {"text": asked[0].text, "image": asked[0].image, "video": asked[0].video}
        assert "+".join(name for name, value in modality.items() if value) == TASKS[key].query_modality
        assert len({query.id for query in asked}) == len(asked)
    assert len(queries["dream_e"]) > len(corpora["dream"].films)
    assert len(queries["cmrb"]) < len(corpora["cmrb"].films)
    assert len(queries["lovr_v"]) < len(corpora["lovr"].films)
    assert all(6 <= len(film.scenes) <= 10 for film in corpora["lovr"].films.values())
    assert all(len(query.candidates) == 10 for key in ("ms_ti", "ms_tv") for query in queries[key])


def test_the_oracle_answers_everything(world):
    """Right answers by the graphs score 1.0 with the metric's own code, so no question has an answer too many."""
    corpora, queries = world
    for key, asked in queries.items():
        films = corpora[CORPUS_OF[key]].films
        truth = np.array([[query.question.is_answered_by(film) for film in films.values()] for query in asked], float)
        ranks = ranks_from_embeddings(
            truth,
            np.eye(len(films)),
            [query.id for query in asked],
            list(films),
            {query.id: query.relevant for query in asked},
            {query.id: query.candidates for query in asked} if TASKS[key].has_candidates else None,
        )
        assert mean_scores(ranks, {TASKS[key].k})[TASKS[key].metric] == 1.0, key
        assert all(len(query.relevant) <= TASKS[key].k for query in asked), key


def test_a_fifth_of_the_targets_have_a_neighbour(world):
    corpora, queries = world
    for key, asked in queries.items():
        neighbours = corpora[CORPUS_OF[key]].neighbours
        share = np.mean([any(film_id in neighbours for film_id in query.relevant) for query in asked])
        assert share >= 0.2, key


def test_composed_queries_need_both_parts(world):
    corpora, queries = world
    texts = {}
    for query in queries["ms_ti"]:
        texts.setdefault(tuple(query.candidates), []).append((query.text.lower(), query.image[0], query.relevant))
    for rows in texts.values():
        for reference in {row[1] for row in rows}:
            assert sum(row[1] == reference for row in rows) > 1  # the picture alone fits several clips


def test_training_and_benchmark_share_no_scene(world):
    corpora, queries = world
    tested = {scene.graph for corpus in corpora.values() for film in corpus.films.values() for scene in film.scenes}
    asked = [query for rows in queries.values() for query in rows]
    films = [query.video for query in asked if query.video] + [query.image[0] for query in asked if query.image]
    tested |= {scene.graph for film in films for scene in film.scenes}
    trained = set()
    for task in pairs.N_PAIRS:
        for pair in pairs.build_pairs(task, seed=0, scale=0.2):
            for item in (pair.query, pair.target, *pair.negatives):
                for film in filter(None, (item.video, item.image and item.image[0])):
                    trained |= {scene.graph for scene in film.scenes}
    assert len(trained) > 500 and not trained & tested
    assert all(not Scene(*graph, 16, 0).is_test for graph in trained)


def test_uvrd_formats_have_their_sides_and_negatives():
    sides = {"t": "text", "i": "image", "v": "video"}
    for task in ("t2t", "t2i", "t2v", "ti2v", "tv2v", "i2v", "v2v"):
        drawn = pairs.build_pairs(task, scale=0.05)
        asked, found = task.split("2")
        for pair in drawn:
            assert all(getattr(pair.query, sides[letter]) for letter in asked)
            assert all(getattr(pair.target, sides[letter]) for letter in found)
        assert any(pair.negatives for pair in drawn) == (task in ("t2v", "ti2v", "tv2v"))


def test_hard_negatives_are_wrong(world):
    for pair in pairs.build_pairs("t2v", scale=0.1):
        for negative in pair.negatives:
            assert negative.video != pair.target.video


def test_texts_are_true_and_no_twin_shares_its_facts():
    for i in range(50):
        rng = generator("test", i)
        scene = draw_scene(rng, test=False, camera=0.5, two_moves=i % 2 == 0)
        for style in STYLES_OF_TEXT:
            said = describe(rng, Film((scene,)), style)
            assert said.text and holds(said.facts, facts_of(Film((scene,))))
        twin = change(rng, scene, "theme")
        assert not holds(describe(rng, Film((scene,)), "theme").facts, facts_of(Film((twin,))))


@pytest.mark.parametrize("action, axis, sign", [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_things_move_where_the_graph_says(action, axis, sign):
    frames = render(Film((one_thing(events=(Event(0, action),)),)))
    red = (frames[..., 0] > 200) & (frames[..., 1] < 60)
    centers = [np.argwhere(mask).mean(0)[axis] for mask in (red[0], red[-1])]
    assert sign * (centers[1] - centers[0]) > 20


def test_growth_and_camera_show():
    grown = render(Film((one_thing(events=(Event(0, "grow"),)),)))
    red = ((grown[..., 0] > 200) & (grown[..., 1] < 60)).sum((1, 2))
    assert red[-1] > 2 * red[0]
    panned = render(Film((one_thing(camera=("pan left", "pan left")),)))
    columns = [np.argwhere((f[..., 0] > 200) & (f[..., 1] < 60)).mean(0)[1] for f in (panned[0], panned[-1])]
    assert columns[1] - columns[0] > 20  # a camera that pans left sees things go right


def test_a_frame_is_told_from_a_neighbours(world):
    corpora, queries = world
    films = corpora["msrvtt"].films
    for query in queries["msrvtt_i2v"][:20]:
        assert relevant(query.question, films) == query.relevant
    film = next(iter(films.values()))
    assert FrameQuestion(film, 0).is_answered_by(film)


def test_videos_are_h264_and_repeat_byte_for_byte():
    film = Film((one_thing(events=(Event(0, "left"),)),))
    data = render_mp4(film)
    assert data == render_mp4(film)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.average_rate == FPS
    assert np.stack(frames).shape == (16, SIDE, SIDE, 3)
    assert np.abs(np.stack(frames).astype(float) - render(film)).mean() < 6
    assert encode_mp4(render(film)) == data


def test_families_need_reference_and_edit():
    for test in (True, False):
        family = draw_family(generator("family test", test), test)
        assert len({clip for _, _, clip in family}) == 10
        for reference, edit, clip in family:
            assert edit.apply(reference) == clip and clip.is_test == test
            assert sum(other[0] == reference for other in family) > 1
            assert sum(other[1] == edit for other in family) > 1


@pytest.fixture
def small_world(monkeypatch):
    """A benchmark and pairs of a few rows, so that files are written in seconds."""
    plans = {name: (4, *plan[1:]) for name, plan in mini_benchmark.PLANS.items()}
    monkeypatch.setattr(mini_benchmark, "PLANS", plans)
    monkeypatch.setattr(mini_benchmark, "composed_corpus", lambda seed, n=1: full_composed(seed, 1))
    monkeypatch.setattr(builders, "_BENCHMARKS", {})
    monkeypatch.setattr(builders, "_FILES", {})


full_composed = mini_benchmark.composed_corpus


def test_same_seed_same_bytes(small_world, tmp_path, capsys):
    for name in ("a", "b"):
        builders._FILES.clear()
        build("uvrb", tmp_path / name, seed=3, scale=1.0)
        build("uvrd", tmp_path / name, seed=3, scale=0.01)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 50
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    build("uvrb", tmp_path / "a", seed=3, scale=1.0)
    assert "is there already" in capsys.readouterr().out


def test_bad_arguments_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["uvrx"])
    assert stop.value.code == 2 and "uvrx" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Unknown task 'x2v'"):
        pairs.build_pairs("x2v")
