"""Writes tiny pairs repos with rendered media."""

import io

import av
import numpy as np
from datasets import Dataset, Features, Image, List, Value, Video
from PIL import Image as Picture


MEDIA = {"text": Value("string"), "image": Image(), "video": Video()}
FEATURES = Features(
    {f"{side}_{kind}": feature for side in ("query", "target") for kind, feature in MEDIA.items()}
    | {
        "negatives": List(dict(MEDIA)),
        "instruction": Value("string"),
        "task": Value("string"),
        "source_id": Value("string"),
    }
)


def noise_video(seed, num_frames=10, height=56, width=56):
    """Bytes of an H.264 MP4 of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "20", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in pixels.repeat(8, 1).repeat(8, 2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def noise_image(seed, height=70, width=56):
    """Bytes of a PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def side(text=None, image=None, video=None):
    """A side whose media are given as bytes."""
    encoded = {"image": image, "video": video}
    return {"text": text} | {kind: data and {"bytes": data, "path": None} for kind, data in encoded.items()}


def row(query, target, negatives=(), instruction=None, source_id=None, task="t2v"):
    """A row of a pairs repo."""
    sides = {f"query_{kind}": value for kind, value in query.items()}
    sides |= {f"target_{kind}": value for kind, value in target.items()}
    extra = {"negatives": list(negatives), "instruction": instruction, "task": task, "source_id": source_id}
    return sides | extra


def write_pairs(folder, rows_by_task, rows_a_group=None):
    """A pairs repo with one Parquet file a task, of row groups of a given size."""
    lines = ["---", "configs:"]
    for task, rows in rows_by_task.items():
        path = folder / task / "train-00000.parquet"
        path.parent.mkdir(parents=True)
        Dataset.from_list(rows, features=FEATURES).to_parquet(path, batch_size=rows_a_group)
        lines += [f"- config_name: {task}", "  data_files:", "  - split: train", f"    path: {task}/train-*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder
