"""The report of `run_uvrb.py` as one HTML file: pictures and frames are data URIs, and it loads nothing."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from dataset_builders.uvrb.tasks import TASKS
from evaluate_metrics.report import LONG_NAMES, ability_rows, dataset_rows, extra_tables, number
from evaluate_metrics.uvrb_abilities.averages import ABILITIES, DATASETS, ability_scores, coverage_note, score_columns
from evaluate_metrics.uvrb_abilities.correlations import correlation_matrix
from evaluate_metrics.uvrb_abilities.published import published_scores
from modeling_gve.video_gve import load_image, load_video


N_FRAMES = 4  # of a video in an example
HEIGHT = 96  # of a frame, pixels
MAX_CHARACTERS = 400  # of a query's text
AVERAGES = ("avg_abilities", "avg_datasets")


def render_html(results, data, radar=None):
    """The whole report.

    Args:
        results (`dict`): as `run_uvrb.py` writes them, see this folder's README.
        data (`dict[str, RetrievalData]`): the datasets by key, for the examples' texts and frames.
        radar (`Path`, *optional*): the PNG of the radar plot.

    Returns:
        `str`: HTML; the same results and data give the same bytes.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    model = results["models"][0]
    comparable = all(_has_published_size(key, entry) for key, entry in model["datasets"].items())
    return environment.get_template("report.html.j2").render(
        results=results,
        model=model,
        tables=[("Abilities", *ability_rows(results)), ("Datasets", *dataset_rows(results)), *extra_tables(results)],
        intervals={key: entry["interval"] for key, entry in model["datasets"].items()},
        note=coverage_note(model["abilities"]),
        radar=radar and _data_uri(radar.read_bytes(), "image/png"),
        heat=heat_map(results),
        comparable=comparable,
        n_published=len(published_scores()),
        correlations=correlation_cells(model if comparable else None),
        long_names=LONG_NAMES,
        examples=[
            example(data[key], miss) for key, entry in model["datasets"].items() for miss in entry["misses"][:1]
        ],
        skipped=[
            (key, side, item["id"], item["reason"])
            for key, entry in model["datasets"].items()
            for side, items in entry["skipped"].items()
            for item in items
        ],
    )


def heat_map(results):
    """Scores by dataset of the models and of the published ones.

    Returns:
        `(header, rows)`: a row is `(name, whether it is published, cells)`, a cell `(text, shade)` with a shade from 0
        for the column's lowest score to 1 for its highest.
    """
    columns = [key for key in DATASETS if key in results["models"][0]["datasets"]]
    names = [*columns, *(name for name in AVERAGES if results["models"][0]["abilities"][name] is not None)]
    rows = []
    for model in results["models"]:
        scores = {key: model["datasets"][key]["score"] for key in columns}
        rows.append((model["name"], False, {**scores, **model["abilities"]}))
    for name, scores in published_scores().items():
        rows.append((name, True, {**scores, **ability_scores(scores)}))
    spans = {name: [values[name] for _, _, values in rows if values[name] is not None] for name in names}
    return names, [
        (name, published, [(number(values[column]), _shade(values[column], spans[column])) for column in names])
        for name, published, values in rows
    ]


def correlation_cells(model=None):
    """Correlations between abilities over the published models and one more.

    Args:
        model (`dict`, *optional*): an entry of the results' `models` whose scores compare with the published ones;
            taken if it covers all 16 datasets.

    Returns:
        `(n_models, names, rows)`: a cell is `(text, value)`, Pearson below the diagonal and Spearman above it.
    """
    scores = published_scores()
    if model and len(model["datasets"]) == len(DATASETS):
        scores[f"{model['name']} (judged here)"] = {key: entry["score"] for key, entry in model["datasets"].items()}
    columns, names = score_columns(scores), (*ABILITIES, *AVERAGES)
    columns = {name: columns[name] for name in names}
    pearson, spearman = (correlation_matrix(columns, method) for method in ("pearson", "spearman"))
    rows = []
    for place, row in enumerate(names):
        matrices = [pearson if column < place else spearman for column in range(len(names))]
        values = [matrix[row][column] for matrix, column in zip(matrices, names)]
        rows.append((row, ["" if value is None else (f"{value:.2f}", value) for value in values]))
    return len(scores), names, rows


def example(data, miss):
    """One miss with what the reader must see to judge it: the query, the right video, and the one ranked first."""
    return {
        "dataset": data.task.key,
        **miss,
        "query_item": _show(data.queries, miss["query"]),
        "relevant_item": _show(data.corpus, miss["relevant"]),
        "retrieved_item": _show(data.corpus, miss["retrieved"]),
    }


def _show(side, name):
    """Text and pictures of one item; a picture that cannot be read is left out, as the skipped items say why."""
    (item,) = side.items([side.ids.index(name)])
    text, pictures = item.get("text") or "", []
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS].rsplit(' ', 1)[0]} …"
    try:
        if "image" in item:
            pictures.append(load_image(item["image"]))
        if "video" in item:
            pictures += list(load_video(item["video"], N_FRAMES).frames)
    except ValueError:
        text = text or "(cannot be shown)"
    return {"text": text, "pictures": [_picture(pixels) for pixels in pictures]}


def _picture(pixels):
    height, width = pixels.shape[:2]
    buffer, size = io.BytesIO(), (max(1, round(width * HEIGHT / height)), HEIGHT)
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=75)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def _data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _shade(value, span):
    if value is None or max(span) == min(span):
        return 0.0
    return (value - min(span)) / (max(span) - min(span))


def _has_published_size(key, entry):
    return entry["n_queries"] == TASKS[key].n_query and round(entry["n_ranked"]) == TASKS[key].n_corpus
