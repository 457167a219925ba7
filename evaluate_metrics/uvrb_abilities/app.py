"""Page of the Space: abilities of scores given as JSON, beside published models. Run with `python app.py`."""

import json

import gradio as gr
from averages import ABILITIES, ability_scores, coverage_note, score_columns
from correlations import METHODS, correlation_matrix
from published import published_scores


ROWS = (*ABILITIES, "avg_abilities", "avg_datasets")
PUBLISHED = published_scores()
SCORES = score_columns(PUBLISHED)


def compare(scores, models):
    """A table of abilities, one column a model, and a sentence on what is missing."""
    try:
        yours = ability_scores(json.loads(scores))
    except (ValueError, TypeError, AttributeError) as error:  # json's decoding errors are ValueErrors too
        raise gr.Error(f"{error}", print_exception=False) from error
    columns = {"yours": yours, **{name: ability_scores(PUBLISHED[name]) for name in models}}
    values = [[row, *(_cell(column[row]) for column in columns.values())] for row in ROWS]
    return {"headers": ["ability", *columns], "data": values}, coverage_note(yours)


def correlate(method):
    """A table of correlations between abilities over the published models."""
    matrix = correlation_matrix({name: SCORES[name] for name in ROWS}, method)
    return {"headers": ["", *ROWS], "data": [[row, *(_cell(matrix[row][name]) for name in ROWS)] for row in ROWS]}


def _cell(value):
    return "" if value is None else f"{value:.3f}"


table = gr.Interface(
    fn=compare,
    inputs=[
        gr.Textbox(json.dumps(PUBLISHED["GVE-3B"], indent=1), label="scores by dataset, 0 to 1 (JSON)", lines=18),
        gr.CheckboxGroup(list(PUBLISHED), value=["GVE-7B"], label="compare with"),
    ],
    outputs=[gr.Dataframe(label="abilities"), gr.Textbox(label="coverage")],
    description="The 9 abilities of the Universal Video Retrieval Benchmark and both averages, by its paper's rule.",
)
matrix = gr.Interface(
    fn=correlate,
    inputs=gr.Radio(list(METHODS), value="pearson", label="coefficient"),
    outputs=gr.Dataframe(label="correlations over the 16 published models"),
)
demo = gr.TabbedInterface([table, matrix], ["Abilities", "Correlations"], title="uvrb_abilities")

if __name__ == "__main__":
    demo.launch()
