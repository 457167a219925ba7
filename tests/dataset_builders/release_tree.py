"""A source tree in the authors' release layout, generated from the rendered world; tiny unless counts are given."""

import json
from pathlib import Path

from dataset_builders.mini.render import encode_mp4, encode_png, frame_times, render, render_frame, render_mp4
from dataset_builders.mini.texts import describe
from dataset_builders.mini.world import Film, draw_scene, generator
from dataset_builders.uvrb.tasks import TASKS


# How the archives are named: the paper's abbreviations; one per kind of place where a video may lie.
FOLDERS = {key: key.upper().replace("_", "-") for key in TASKS}
FRAMES = ("didemo",)  # videos come as folders of frames
SUBFOLDERS = ("vdc_o", "vdc_d")
SHARED = {"crb_s": "crb_g", "crb_t": "crb_g", "vdc_d": "vdc_o", "lovr_c2v": "lovr_v", "msrvtt_i2v": "msrvtt"}
N_CORPUS = 3


def draw_film(corpus, number):
    """A short film of one scene, different for each corpus and number."""
    scene = draw_scene(generator("release tree", corpus, number), test=True, things=(1, 3), events=(1, 2))
    return Film((scene,))


class Videos:
    """Rendered files, each encoded once."""

    def __init__(self):
        self.content = {}

    def __getitem__(self, film):
        if film not in self.content:
            self.content[film] = render_mp4(film)
        return self.content[film]


def write_release(root, keys=tuple(TASKS), n_corpus=N_CORPUS, n_queries=None, videos=None):
    """Writes datasets of `n_corpus` videos, and of as many queries unless told.

    Args:
        root (`Path`): gets `<DS>/UVRB/<DS>/` for each.
        keys (sequence of `str`): which.
        n_corpus, n_queries (`int` or `dict[str, int]`): sizes, by key if they differ.
        videos (`Videos`, *optional*): rendered before.

    Returns:
        `dict[str, Path]`: folder by key.
    """
    videos = videos or Videos()
    folders = {}
    for key in keys:
        name = FOLDERS[key]
        folders[key] = folder = Path(root) / name / "UVRB" / name
        size = n_corpus[key] if isinstance(n_corpus, dict) else n_corpus
        asked = n_queries[key] if isinstance(n_queries, dict) else n_queries or size
        films = [draw_film(SHARED.get(key, key), i) for i in range(size)]
        corpus = [write_video(folder, key, f"v{i:05d}", film, videos) for i, film in enumerate(films)]
        queries = [write_query(folder, key, i, films[i % size], videos) for i in range(asked)]
        instances = [{"qid": row["id"], "pos": [corpus[i % size]["id"]]} for i, row in enumerate(queries)]
        if TASKS[key].has_candidates:
            for i, row in enumerate(instances):
                others = [corpus[(i + step) % size]["id"] for step in range(1, min(size, 10))]
                row["neg"] = [name for name in others if name not in row["pos"]]
        for part, rows in (("corpus", corpus), ("queries", queries), ("instances", instances)):
            write_lines(folder / "jsonl" / f"{part}.jsonl", rows)
    return folders


def write_video(folder, key, name, film, videos):
    if key in FRAMES:
        place = folder / "videos_frames" / name
        place.mkdir(parents=True)
        for number, frame in enumerate(render(film, range(0, len(frame_times(film)), 4))):
            (place / f"{number}.png").write_bytes(encode_png(frame))
        return {"id": name, "video": f"{name}.mp4"}
    inside = f"videos/part1/{name}.mp4" if key in SUBFOLDERS else f"videos/{name}.mp4"
    put(folder / inside, videos[film])
    return {"id": name, "video": f"{name}.mp4"}


def write_query(folder, key, number, film, videos):
    row = {"id": f"q{number:05d}"}
    for kind in TASKS[key].query_modality.split("+"):
        if kind == "text":
            # The number keeps texts of one film apart.
            text = describe(generator("release text", key, number), film, "general").text
            row["text"] = f"{text} ({number})"
        elif kind == "image":
            row["image"] = f"q{number:05d}.png"
            frames = frame_times(film)
            put(folder / "images" / row["image"], encode_png(render_frame(*frames[len(frames) // 3])))
        else:
            row["video"] = f"clips/q{number:05d}.mp4"
            put(folder / "videos" / row["video"], encode_mp4(render(film, range(2, 14))))
    return row


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
