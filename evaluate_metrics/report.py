"""Shows the results of `run_uvrb.py`: tables, as Markdown or as rows for the HTML report, and a radar plot."""

import math

from matplotlib.figure import Figure

from dataset_builders.uvrb.tasks import TASKS, abilities
from evaluate_metrics.uvrb_abilities.averages import ABILITIES, coverage_note


AVERAGES = {"avg_abilities": "average over abilities", "avg_datasets": "average over datasets"}
LONG_NAMES = {
    "TXT": "textual",
    "CMP": "composed",
    "VIS": "visual",
    "CG": "coarse-grained",
    "FG": "fine-grained",
    "LC": "long-context",
    "S": "spatial",
    "T": "temporal",
    "PR": "partially relevant",
}
COLOURS = (
    "#1f5fb4",
    "#d9631e",
    "#2a8f5b",
    "#8c4fb0",
    "#b3304f",
    "#5b6670",
)  # told apart in grey and by colour-blind eyes
LINES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))


def render_markdown(results):
    """Datasets and abilities, one column a model, with chance level and what was left out; then sweep and diagnostics.

    Args:
        results (`dict`): as `run_uvrb.py` writes them, see this folder's README.

    Returns:
        `str`: Markdown whose columns also line up as plain text.
    """
    models = results["models"]
    parts = [
        f"# UVRB scores of {models[0]['name']}",
        f"Benchmark: {results['benchmark']}. Chance: the expected score of a random order.",
        _table(*dataset_rows(results)),
        _table(*ability_rows(results)),
        coverage_note(models[0]["abilities"]),
        *_skipped_lines(models),
    ]
    for title, header, rows in extra_tables(results):
        parts += [f"## {title}", _table(header, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def dataset_rows(results):
    """Header and rows of the table of datasets, one column a model."""
    models, chance = results["models"], results["chance"]["datasets"]
    header = ["dataset", "abilities", "metric", *(model["name"] for model in models)]
    rows = []
    for key, entry in models[0]["datasets"].items():
        scores = [number(model["datasets"][key]["score"]) for model in models]
        sizes = [f"{entry['n_queries']}", f"{entry['n_ranked']:g}", f"{_count_skipped(entry)}"]
        path = " ".join(abilities(TASKS[key]))
        rows.append([key, path, entry["metric"], *scores, number(chance[key]), *sizes])
    return [*header, "chance", "queries", "ranked", "skipped"], rows


def ability_rows(results):
    """Header and rows of the table of abilities and both averages."""
    columns = [*(model["abilities"] for model in results["models"]), results["chance"]["abilities"]]
    header = ["ability", "meaning", *(model["name"] for model in results["models"]), "chance"]
    names = {**{name: LONG_NAMES[name] for name in ABILITIES}, **AVERAGES}
    return header, [[name, meaning, *(number(column[name]) for column in columns)] for name, meaning in names.items()]


def extra_tables(results):
    """`(title, header, rows)` of the sweep and of the diagnostics, as far as the results hold them.

    Results of schema version 1 hold none.
    """
    tables = []
    if results.get("sweep"):
        tables.append(("Test-time scaling", *_sweep_rows(results)))
    if any(model.get("classification") for model in results["models"]):
        tables.append(("Classification as video-to-label retrieval", *_classification_rows(results["models"])))
    if any(model.get("reverse_time") for model in results["models"]):
        tables.append(("Preference of a clip over its own reversal", *_reverse_rows(results["models"])))
    return tables


def number(value):
    """A score as tables print it."""
    return "-" if value is None else f"{value:.3f}"


def draw_radar(curves, path, title="UVRB abilities"):
    """Writes a radar plot of abilities as PNG.

    Args:
        curves (`dict[str, dict]`): results of `ability_scores` by the legend's name, the most important first.
            `chance`, if there, is drawn as a grey area. Abilities that the first one lacks are left out.
        path (`str`, `Path` or binary file): the PNG.
        title (`str`): above the plot.

    Raises:
        ValueError: the first one covers fewer than three abilities.
    """
    first = next(iter(curves.values()))
    axes_names = [name for name in ABILITIES if first[name] is not None]
    if len(axes_names) < 3:
        raise ValueError(f"A radar needs three abilities or more, these scores cover {len(axes_names)}; add datasets.")
    figure = Figure(figsize=(7.6, 6.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    _draw_grid(axes, axes_names, curves)
    models = {name: values for name, values in curves.items() if name != "chance"}
    for rank, (name, values) in enumerate(models.items()):
        _draw_curve(axes, axes_names, values, _label(name, values), rank)
    if "chance" in curves:
        outline = _closed([curves["chance"][name] for name in axes_names])
        style = {"facecolor": "#9aa0a680", "edgecolor": "#5b6670", "linewidth": 1, "zorder": 4}
        axes.fill(*outline, label=_label("chance", curves["chance"]), **style)
    axes.set_title(title, fontsize=14, fontweight="bold", pad=48)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10.5, handlelength=3.2)
    figure.savefig(path, format="png", dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def _draw_grid(axes, names, curves):
    highest = max(values[name] or 0 for values in curves.values() for name in names)
    step = 0.1 if highest <= 0.5 else 0.2
    count = max(2, math.ceil(highest / step - 1e-9))
    top, rings = step * count, [step * (ring + 1) for ring in range(count)]
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, top)
    axes.set_yticks(rings, [f"{ring:.1f}" for ring in rings], fontsize=8.5, color="#6b7280")
    axes.set_rlabel_position(math.degrees(_angles(len(names))[1] / 2))
    axes.set_xticks(_angles(len(names)), [""] * len(names))
    for angle, name in zip(_angles(len(names)), names):
        sideways, upwards = math.sin(angle), math.cos(angle)
        align = {
            "ha": "center" if abs(sideways) < 0.1 else "left" if sideways > 0 else "right",
            "va": "center" if abs(upwards) < 0.5 else "bottom" if upwards > 0 else "top",
        }
        axes.text(angle, 1.05 * top, f"{name}\n{LONG_NAMES[name]}", fontsize=10.5, **align)
    axes.grid(color="#d7dbe0", linewidth=0.8)
    axes.spines["polar"].set_color("#d7dbe0")


def _draw_curve(axes, names, values, label, rank):
    colour, line = COLOURS[rank % len(COLOURS)], LINES[rank % len(LINES)]
    outline = _closed([math.nan if values[name] is None else values[name] for name in names])
    style = {"color": colour, "linestyle": line, "linewidth": 2.2, "marker": "o", "markersize": 4.5}
    axes.plot(*outline, label=label, zorder=99 - rank, **style)
    if rank == 0:
        axes.fill(*outline, color=colour, alpha=0.12, zorder=3)


def _label(name, values):
    average = values["avg_abilities"]
    return name if average is None else f"{name} (average {average:.3f})"


def _angles(count):
    return [2 * math.pi * place / count for place in range(count)]


def _closed(values):
    angles = _angles(len(values))
    return [*angles, angles[0]], [*values, values[0]]


def _sweep_rows(results):
    names = [name for name in (*ABILITIES, *AVERAGES) if results["sweep"][0]["abilities"][name] is not None]
    keys = list(results["sweep"][0]["datasets"])
    axes = list(results["sweep"][0]["setting"])
    rows = []
    for run in results["sweep"]:
        setting = ["model's" if run["setting"][axis] is None else str(run["setting"][axis]) for axis in axes]
        scores = [run["abilities"][name] for name in names] or [run["datasets"][key]["score"] for key in keys]
        size = run["datasets"][keys[0]]["bytes_per_vector"]
        rows.append([*setting, str(size), *(number(score) for score in scores)])
    return [*axes, "bytes a vector", *(names or keys)], rows


def _classification_rows(models):
    header = ["set", "metric", *(model["name"] for model in models), "chance", "videos", "labels"]
    rows = []
    for key, entry in models[0]["classification"].items():
        scores = [number(model["classification"][key]["score"]) for model in models]
        sizes = [f"{entry['n_queries']}", f"{entry['n_corpus']}"]
        rows.append([key, "accuracy", *scores, number(entry["chance"]), *sizes])
    return header, rows


def _reverse_rows(models):
    header = ["dataset", *(model["name"] for model in models), "chance", "queries"]
    rows = []
    for key, entry in models[0]["reverse_time"].items():
        shares = [number(model["reverse_time"][key]["preferred"]) for model in models]
        rows.append([key, *shares, number(0.5), f"{entry['n_queries']}"])
    return header, rows


def _skipped_lines(models):
    """One bullet for each item that could not be embedded."""
    lines = [
        f"- {model['name']}: {key} {side} {entry['id']}: {entry['reason']}"
        for model in models
        for key, scores in model["datasets"].items()
        for side, entries in scores["skipped"].items()
        for entry in entries
    ]
    return ["Skipped items, each counted as a miss:", "\n".join(lines)] if lines else []


def _count_skipped(entry):
    return sum(len(entries) for entries in entry["skipped"].values())


def _table(header, rows):
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    numeric = [all(row[column][:1] in "-0123456789" for row in rows) for column in range(len(header))]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(_pad(*cell) for cell in zip(line, widths, numeric))} |" for line in lines)


def _pad(text, width, right):
    return text.rjust(width) if right else text.ljust(width)
