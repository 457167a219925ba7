"""The dataset card: configs for `load_dataset`, counts by format and drop reason, distributions, samples."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import jinja2
import yaml
from datatrove.pipeline.base import PipelineStep
from PIL import Image

from dataset_builders.synflow.documents import PartReader, count_dropped
from dataset_builders.synflow.footage import encode_jpeg, read_frames
from dataset_builders.synflow.prompts import TASKS, prompt_hash
from dataset_builders.synflow.publish import quantiles, read_rows
from dataset_builders.synflow.recipe import FORMATS
from dataset_builders.synflow.store import write_whole
from dataset_builders.synflow.texts import count_words


MARKER = "synflow.json"
SAMPLES = 4


def configs(output):
    """`configs` of the card's YAML, by what lies in `data/`."""
    files = sorted(str(path.relative_to(output)) for path in Path(output).glob("data/*/*.parquet"))
    found = {task: [f for f in files if f.startswith(f"data/{task}/")] for task in (*FORMATS, "media")}
    groups = {
        "all": [f for task in FORMATS for f in found[task]],
        **{task: found[task] for task in found if found[task]},
    }
    listed = []
    for name, members in groups.items():
        splits = {
            split: [f for f in members if Path(f).name.startswith(f"{split}-")] for split in ("train", "validation")
        }
        data_files = [{"split": split, "path": paths} for split, paths in splits.items() if paths]
        listed.append({"config_name": name, "data_files": data_files})
    listed[0]["default"] = True
    return listed


def digest(output):
    """Hash of all shards: the card bears it, and so changes with the data."""
    total = hashlib.sha256()
    for path in sorted(Path(output).glob("data/*/*.parquet")):
        total.update(str(path.relative_to(output)).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


class Card(PipelineStep):
    """Writes README.md, its plots and samples, and last the marker that says that the dataset is complete."""

    type, name = "🪪", "card"

    def __init__(self, recipe, work, output):
        super().__init__()
        self.recipe, self.work, self.output = recipe, Path(work), Path(output)

    def run(self, data=None, rank=0, world_size=1):
        counts, words = Counter(), []
        for row in read_rows(self.output, ["task", "query_text"]):
            counts[row["task"], row["split"]] += 1
            if row["query_text"]:
                words.append(count_words(row["query_text"]))
        videos = list(PartReader(self.work / "selected", every=True).run())
        total = sum(counts.values())
        table = [
            {
                "task": task,
                "train": counts[task, "train"],
                "validation": counts[task, "validation"],
                "share": 100 * (counts[task, "train"] + counts[task, "validation"]) / max(1, total),
                "paper": 100 * self.recipe.budgets.get(task, 0) / sum(self.recipe.budgets.values()),
            }
            for task in FORMATS
        ]
        seconds = [video.metadata["seconds"] for video in videos if "seconds" in video.metadata]
        self.plot(words, seconds, table)
        front = yaml.safe_dump(
            {"license": "other", "task_categories": ["feature-extraction"], "configs": configs(self.output)},
            sort_keys=False,
        )
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent))
        text = environment.get_template("card.md.j2").render(
            recipe=self.recipe,
            table=table,
            total=total,
            videos=len(videos),
            dropped=[(*key, number) for key, number in sorted(count_dropped(self.work).items())],
            seconds=quantiles(seconds),
            prompts={task: prompt_hash(task) for task in TASKS},
            samples=[] if self.recipe.pairs == "raw" else self._samples(),  # raw videos may be broken
            digest=digest(self.output),
        )
        write_whole(self.output / "README.md", f"---\n{front}---\n{text}\n")
        write_whole(
            self.output / MARKER, json.dumps({"recipe": self.recipe.fingerprint, "pairs": total}, sort_keys=True)
        )
        yield from ()

    def plot(self, words, seconds, table):
        from matplotlib.figure import Figure  # slow to import, and needed once

        figure = Figure(figsize=(12, 3.2))
        axes = figure.subplots(1, 3)
        axes[0].bar([line["task"] for line in table], [line["share"] for line in table], label="here")
        axes[0].plot([line["task"] for line in table], [line["paper"] for line in table], "k_", label="recipe")
        axes[0].set(title="Pairs by format", ylabel="%")
        axes[0].legend()
        axes[1].hist(words, bins=40)
        axes[1].set(title="Words of a query")
        axes[2].hist(seconds, bins=40)
        axes[2].set(title="Seconds of a video")
        buffer = io.BytesIO()
        figure.tight_layout()
        figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
        write_whole(self.output / "assets" / "distributions.png", buffer.getvalue())

    def _samples(self):
        """A few pairs of video targets with a strip of frames each."""
        samples = []
        for task in FORMATS:
            paths = sorted((self.work / "paired").glob(f"{task}-train-*.jsonl"))
            if not paths or task in ("t2t", "t2i"):
                continue
            with open(paths[0], encoding="utf-8") as lines:
                pair = json.loads(next(lines))
            name = f"assets/{task}.jpg"
            write_whole(self.output / name, _strip(pair["target"]["video"]))
            samples.append({"task": task, "text": pair["query"].get("text"), "picture": name})
        return samples[: SAMPLES + 1]


def _strip(path, frames=4, side=112):
    import av

    with av.open(str(path)) as container:
        seconds = float(container.duration or 0) / av.time_base
    pictures = [
        Image.open(io.BytesIO(encode_jpeg(frame, 90, side)))
        for frame in read_frames(str(path), [seconds * (k + 0.5) / frames for k in range(frames)])
    ]
    strip = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    for k, picture in enumerate(pictures):
        strip.paste(picture, (k * pictures[0].width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
