"""Page of the Space: metrics of ranked ids given as JSON. Run with `python app.py`."""

import json

import gradio as gr
from ranking import mean_scores, ranks_from_ids


EXAMPLE = [
    '[["v2", "v1", "v3"], ["v3", "v1"]]',
    '[["v1"], ["v3", "v2"]]',
    "1, 2, 3",
]


def score(predictions, references, k):
    """Scores of two JSON lists of lists of ids and of cut-offs separated by commas."""
    try:
        cutoffs = [int(value) for value in k.split(",")]
        return mean_scores(ranks_from_ids(json.loads(predictions), json.loads(references)), cutoffs)
    except (ValueError, TypeError) as error:  # json's decoding errors are ValueErrors too
        raise gr.Error(f"{error}", print_exception=False) from error


demo = gr.Interface(
    fn=score,
    inputs=[
        gr.Textbox(EXAMPLE[0], label="predictions: each query's ranked ids, best first (JSON)", lines=4),
        gr.Textbox(EXAMPLE[1], label="references: each query's relevant ids (JSON)", lines=4),
        gr.Textbox(EXAMPLE[2], label="k"),
    ],
    outputs=gr.JSON(label="means over queries"),
    title="uvrb_retrieval",
    description="Recall, precision, nDCG, MRR and MAP as the Universal Video Retrieval Benchmark counts them.",
)

if __name__ == "__main__":
    demo.launch()
