"""What the 8-frame video costs: a benchmark's scores from its files, and from clips of several qualities.

```bash
python -m dataset_builders.uvrb.quality --benchmark build/hub/org/uvrb-mini --model build/hub/org/gve-mini
```

Prints, for the files, for the clips as they are built, and for clips of each rate factor, the median size of a clip,
the smallest cosine between a video's two embeddings, and each dataset's score.
"""

import argparse
import io
import sys

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from dataset_builders.uvrb.tasks import get_tasks
from dataset_builders.uvrb.video_files import CLIP_QUALITIES, encode_clip, inspect
from evaluate_metrics.retrieval_data import load_retrieval_data
from evaluate_metrics.uvrb_retrieval.ranking import mean_scores, ranks_from_embeddings


RATES = (14, 18, 22, 26)


def as_clip(item, rates):
    """The item with its video as an 8-frame clip of the first of these rate factors that fits; None leaves it."""
    if rates is None or "video" not in item:
        return item
    found = inspect(io.BytesIO(item["video"]["bytes"]))
    return {**item, "video": {"bytes": encode_clip(found, rates), "path": None}}


def measure(model, data, rates):
    """Score of one dataset, embeddings of its corpus, sizes of its clips in bytes."""
    sides, sizes = [], []
    for side, instruction in ((data.queries, data.task.instruction), (data.corpus, None)):
        items = [as_clip(item, rates) for item in side.items(range(len(side)))]
        sizes += [len(item["video"]["bytes"]) for item in items if "video" in item]
        with torch.inference_mode():
            sides.append(model.encode(items, instruction=instruction).float().cpu().numpy())
    ids = (data.queries.ids, data.corpus.ids)
    scores = mean_scores(ranks_from_embeddings(*sides, *ids, data.relevant, data.candidates), {data.task.k})
    return scores[data.task.metric], sides[1], sizes


def compare(model, parts, rates=RATES):
    """Rows of the table: `{"rate", "median_kb", "cosine", <key>: score}`, the files first, then clips as built."""
    rows, reference = [], {}
    for name, tried in {"files": None, "as built": CLIP_QUALITIES, **{rate: (rate,) for rate in rates}}.items():
        row, sizes, cosines = {"rate": name}, [], [1.0]
        for data in tqdm(parts, desc=str(name), unit="dataset"):
            score, corpus, own = measure(model, data, tried)
            key = data.task.key
            row[key], sizes = score, sizes + own
            cosines.append(float((reference.setdefault(key, corpus) * corpus).sum(axis=1).min()))
        rows.append({**row, "median_kb": float(np.median(sizes)) / 1024, "cosine": min(cosines)})
    return rows


def main(words=None):
    parser = argparse.ArgumentParser(
        prog="python -m dataset_builders.uvrb.quality", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--benchmark", required=True, help="repo whose videos are files")
    parser.add_argument("--model", required=True, help="GVE repo; its code is run")
    parser.add_argument("--datasets", nargs="+", metavar="KEY", help="default: all 16")
    parser.add_argument("--rates", nargs="*", type=int, default=RATES, help="x264 rate factors (default: %(default)s)")
    arguments = parser.parse_args(words)
    datasets.disable_progress_bars()
    try:
        parts = [load_retrieval_data(arguments.benchmark, task) for task in get_tasks(arguments.datasets)]
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True).eval()
    except (ValueError, OSError) as error:
        print(f"dataset_builders.uvrb.quality: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rows = compare(model, parts, arguments.rates)
    keys = [data.task.key for data in parts]
    print("| rate factor | median KB | smallest cosine | " + " | ".join(keys) + " |")
    print("|---" * (3 + len(keys)) + "|")
    for row in rows:
        scores = " | ".join(f"{row[key]:.4f}" for key in keys)
        print(f"| {row['rate']} | {row['median_kb']:.0f} | {row['cosine']:.4f} | {scores} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
