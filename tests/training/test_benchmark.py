"""The benchmark compares like with like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_builders.mini.render import encode_mp4
from modeling_gve import PreparedItem
from modeling_gve.video_gve import decode_video
from training.arguments import ModelArguments
from training.benchmark import (
    BASE,
    PARTS,
    TOKENS_PER_FRAME,
    in_own_process,
    sentence_transformer,
    with_frames,
    write_pairs,
)
from training.weights import load_model


def test_both_trainers_embed_the_same_tokens():
    pytest.importorskip("sentence_transformers")
    theirs = sentence_transformer().eval()
    model, processor = load_model(ModelArguments(model=str(BASE), max_tokens_per_frame=TOKENS_PER_FRAME))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    video = encode_mp4(pixels)
    frames, times = decode_video(video, 8)
    framed = with_frames({"query_text": [None], "target_video": [{"bytes": video}]})["target_video"][0]
    text = "a red circle moves to the left"
    sides = [
        (PreparedItem(processor.instruction, text), text),
        (PreparedItem(processor.instruction, "", image=pixels[0]), Image.fromarray(pixels[0])),
        (PreparedItem(processor.instruction, "", frames=frames, times=times), framed),
    ]
    for ours, item in sides:
        inputs, features = processor.collate([ours]), theirs.preprocess([item])
        assert inputs["input_ids"].tolist() == features["input_ids"].tolist()
        with torch.no_grad():
            row, other = model.eval()(**inputs).embeddings, theirs(features)["sentence_embedding"]
        torch.testing.assert_close(row, other, atol=1e-4, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks come from Linux")
def test_measures_of_ours(tmp_path):
    assert in_own_process("memory", batch_size=4, micro_batch_size=2)["bytes"] > 2**20
    write_pairs(tmp_path, "t2v", 12)
    settings = {"batch_size": 4, "micro_batch_size": 2, "steps": 3, "seed": 0, "threads": 1}
    found = in_own_process("gve", pairs=str(tmp_path), task="t2v", **settings)
    assert found["ms_a_pair"].keys() == {*PARTS, "other"} and min(found["ms_a_pair"][part] for part in PARTS) > 0
    assert sum(found["ms_a_pair"].values()) == pytest.approx(1000 / found["pairs_per_second"])
