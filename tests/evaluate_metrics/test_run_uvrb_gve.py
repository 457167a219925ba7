"""The runner with a real GVE repo: a tiny random model that reads H.264 files, images and texts out of Parquet."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_benchmark import write_benchmark

from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.diagnostics import reverse_frames
from evaluate_metrics.run_uvrb import RunArguments, run
from modeling_gve import GVEModel, GVEProcessor
from modeling_gve.video_gve import load_video


KEYS = ["didemo", "ms_ti", "msrvtt_i2v", "lovr_c2v"]


def frames(seed, side=56):
    """8 frames of coarse noise, uint8 of shape `(8, side, side, 3)`."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    return noise.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def as_video(seed, side=56):
    """The frames as the bytes of an H.264 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for pixels in frames(seed, side):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return {"bytes": file.getvalue(), "path": None}


def as_image(seed):
    """The first frame as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(frames(seed)[0]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def query(task, number):
    row = {"id": f"q{number}", "text": f"noise number {number}", "image": as_image(number), "video": as_video(number)}
    return {name: row[name] for name in ("id", *task.query_modality.split("+"))}


@pytest.fixture(scope="module")
def repo(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gve-random")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_saved_random_model_is_scored_as_by_hand(repo, model, processor, tmp_path):
    """The same scores as from `encode` and a sorted similarity matrix; a file that is no video is a named miss."""
    videos = [{"id": f"v{n}", "video": as_video(n)} for n in range(6)]
    bench = write_benchmark(tmp_path / "bench", KEYS, corpus=videos, query=query, change=cut_a_query)
    results = run(RunArguments(repo, bench, str(tmp_path / "out"), KEYS, batch_size=4))
    entries = results["models"][0]["datasets"]
    corpus = model.encode([{"video": row["video"]} for row in videos], processor)
    for key in KEYS:
        items = [{k: v for k, v in query(TASKS[key], n).items() if k != "id"} for n in range(6)]
        scores = model.encode(items, processor, TASKS[key].instruction) @ corpus.T
        if key == "ms_ti":  # its candidates are the video of its number and the next three
            scores = scores + torch.tensor([[0.0 if (v - q) % 6 < 4 else -9.0 for v in range(6)] for q in range(6)])
        hits = scores.argmax(dim=1) == torch.arange(6)
        assert entries[key]["score"] == pytest.approx(float(hits[int(key == "lovr_c2v") :].sum()) / 6), key
    (skipped,) = entries["lovr_c2v"]["skipped"]["queries"]
    assert skipped["id"] == "q0" and skipped["reason"]
    assert all(0 <= entry["score"] <= 1 and not entry["skipped"]["corpus"] for entry in entries.values())


def test_frames_and_reversal_reach_the_model(repo, model, tmp_path):
    """With 4 frames the scores are those of a processor that reads 4, and so is the preference over the reversal."""
    videos = [{"id": f"v{n}", "video": as_video(n)} for n in range(6)]
    bench = write_benchmark(tmp_path / "bench", ["crb_t"], corpus=videos, query=query)
    args = RunArguments(
        *(repo, bench, str(tmp_path / "out"), ["crb_t"]), batch_size=4, num_frames=[4, 8], reverse_time=["crb_t"]
    )
    results = run(args)
    assert [each["setting"]["num_frames"] for each in results["sweep"]] == [4, 8]
    processor = GVEProcessor.from_pretrained(repo, num_frames=4)
    texts = model.encode([query(TASKS["crb_t"], n)["text"] for n in range(6)], processor, TASKS["crb_t"].instruction)
    clips = [load_video(row["video"], 4) for row in videos]
    sides = [model.encode([{"video": c} for c in each], processor) for each in (clips, map(reverse_frames, clips))]
    ranks = ((texts @ sides[0].T) >= (texts * sides[0]).sum(1, keepdim=True) - 1e-6).sum(1)
    assert results["sweep"][0]["datasets"]["crb_t"]["scores"]["mrr"] == pytest.approx(float((1 / ranks).mean()))
    margins = ((texts * sides[0]).sum(1) - (texts * sides[1]).sum(1)).numpy()
    assert (abs(margins) > 1e-6).all()  # the model tells a clip from its reversal
    found = results["models"][0]["reverse_time"]["crb_t"]
    assert found["preferred"] == pytest.approx((margins > 0).mean())
    assert found["mean_margin"] == pytest.approx(margins.mean(), abs=1e-6)
    assert "own reversal" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/jpeg") >= 8 * bool(
        results["models"][0]["datasets"]["crb_t"]["misses"]
    )


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """`(benchmark, texts, videos)` of one dataset whose clips are the noise of their queries."""
    videos = [{"id": f"v{n}", "video": as_video(n, side=112)} for n in range(6)]
    bench = write_benchmark(tmp_path_factory.mktemp("bench") / "bench", ["crb_t"], corpus=videos, query=query)
    return bench, [query(TASKS["crb_t"], n)["text"] for n in range(6)], [{"video": row["video"]} for row in videos]


def mean_reciprocal_rank(texts, videos):
    ranks = ((texts @ videos.T) >= (texts * videos).sum(1, keepdim=True) - 1e-6).sum(1)
    return pytest.approx(float((1 / ranks).mean()))


def test_token_limits_reach_the_model(repo, model, captions, tmp_path):
    """Clips of 16 tokens a frame, cut to 9, score as with a processor of this limit, and not as the whole ones do."""
    bench, texts, videos = captions
    results = run(RunArguments(repo, bench, str(tmp_path / "out"), ["crb_t"], max_tokens_per_frame=[10, 200]))
    sides = []
    for limit, each in zip((10, 200), results["sweep"], strict=True):
        assert each["setting"]["max_tokens_per_frame"] == limit
        processor = GVEProcessor.from_pretrained(repo, max_tokens_per_frame=limit)
        sides.append(model.encode(videos, processor))
        queries = model.encode(texts, processor, TASKS["crb_t"].instruction)
        assert each["datasets"]["crb_t"]["scores"]["mrr"] == mean_reciprocal_rank(queries, sides[-1])
    assert (sides[0] - sides[1]).abs().max() > 1e-3


def test_a_backbone_is_judged_as_the_embedder_that_training_starts_from(captions, tmp_path):
    bench, texts, videos = captions
    base = str(Path(__file__).parents[2] / "training" / "gve-mini-base")
    results = run(RunArguments(base, bench, str(tmp_path / "out"), ["crb_t"], dtype="float32"))
    embedder = GVEModel.from_pretrained(base, max_tokens_per_frame=17, dtype=torch.float32).eval()
    queries, corpus = embedder.encode(texts, instruction=TASKS["crb_t"].instruction), embedder.encode(videos)
    assert results["models"][0]["datasets"]["crb_t"]["scores"]["mrr"] == mean_reciprocal_rank(queries, corpus)


def cut_a_query(config, rows):
    if config == "lovr_c2v-queries":
        rows[0] = {"id": "q0", "video": {"bytes": rows[0]["video"]["bytes"][:200], "path": None}}
    return rows
