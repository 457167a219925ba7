"""`uvrb_abilities` for `evaluate.load`: a thin door to `averages.py` and the published scores."""

import warnings

import datasets
import evaluate

from .averages import ability_scores, coverage_note, score_columns
from .correlations import correlation_matrix
from .published import published_scores


_DESCRIPTION = """\
From scores on the 16 datasets of the Universal Video Retrieval Benchmark (UVRB) to its 9 abilities and both averages,
by the averaging rule of its paper, with the published scores of 16 models at hand for comparison.
"""

_CITATION = """\
@misc{gve2025,
    title = {Towards Universal Video Retrieval:
             Generalizing Video Embedding via Synthesized Multimodal Pyramid Curriculum},
    year = {2025},
    eprint = {2510.27571},
    archivePrefix = {arXiv},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    scores (`dict[str, float]`): by dataset key, each from 0 to 1; may lack some of the 16.
    compare (list of `str`, *optional*): models of the paper whose abilities are added.
    correlate (`str`, *optional*): `pearson` or `spearman`; adds correlations over the paper's 16 models and yours.

Returns:
    `dict`: `TXT`, `CMP`, `VIS`, `CG`, `FG`, `LC`, `S`, `T`, `PR`, `avg_abilities`, `avg_datasets` (`None` where a
    dataset is missing, never an average over fewer), `missing_datasets`, `incomplete_abilities`; with `compare` also
    `published`, the same by model; with `correlate` also `correlations`, between all abilities, averages and datasets.
    Your model is among those correlated where it covers all 16 datasets.

Examples:

    >>> import evaluate
    >>> metric = evaluate.load("org/uvrb_abilities")
    >>> result = metric.compute(scores=metric.published_scores["GVE-7B"], compare=["GVE-3B"])
    >>> round(result["avg_abilities"], 3), round(result["TXT"], 3), result["missing_datasets"]
    (0.599, 0.657, [])
    >>> round(result["published"]["GVE-3B"]["avg_abilities"], 3)
    0.571
    >>> metric.compute(scores=metric.published_scores["GVE-7B"], correlate="spearman")["correlations"]["S"]["S"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class UvrbAbilities(evaluate.Metric):
    """The 9 abilities of UVRB and both averages, from scores by dataset."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # evaluate demands features; the scores do not pass through them, see `compute`
            features=datasets.Features({"scores": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2510.27571"],
        )

    @property
    def published_scores(self):
        """Scores that the paper publishes, by model and dataset key."""
        return published_scores()

    def compute(self, *, scores, compare=None, correlate=None):
        """Abilities of one model; warns where the scores do not cover all 16 datasets."""
        result = ability_scores(scores)
        note = coverage_note(result)
        if note:
            warnings.warn(note, stacklevel=2)
        if compare is not None:
            result["published"] = self._published(compare)
        if correlate is not None:
            own = {} if result["missing_datasets"] else {"yours": scores}
            result["correlations"] = correlation_matrix(score_columns({**self.published_scores, **own}), correlate)
        return result

    def _compute(self, scores, compare=None, correlate=None):
        return self.compute(scores=scores, compare=compare, correlate=correlate)

    def _published(self, models):
        table = self.published_scores
        unknown = [name for name in models if name not in table]
        if unknown:
            raise ValueError(f"No published scores of {', '.join(unknown)}; choose from {', '.join(table)}.")
        return {name: ability_scores(table[name]) for name in models}
