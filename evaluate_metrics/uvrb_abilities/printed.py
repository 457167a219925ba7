"""What the GVE paper prints beside its scores by dataset (arXiv 2510.27571): table 2, table 1's averages, figure 7.

Not every cell follows from table 1. The functions here tell which do; this folder's README lists the others. Plain
Python, in code rather than in data files, because `evaluate.load` fetches only the modules that a metric imports.
"""

_ABILITIES = """
model,avg_abilities,TXT,CMP,VIS,CG,FG,LC,S,T,PR,avg_datasets
CLIP4Clip,0.416,0.401,0.178,0.714,0.38,0.36,0.463,0.559,0.285,0.236,0.39
ViCLIP,0.375,0.336,0.263,0.64,0.38,0.315,0.313,0.484,0.289,0.171,0.352
VideoCLIP-XL,0.51,0.55,0.227,0.632,0.558,0.493,0.6,0.787,0.381,0.31,0.491
LanguageBind,0.508,0.543,0.231,0.645,0.539,0.479,0.61,0.723,0.378,0.336,0.487
InternVideo2-1B,0.42,0.422,0.248,0.581,0.48,0.403,0.383,0.606,0.413,0.189,0.404
InternVideo2-6B,0.445,0.448,0.22,0.66,0.504,0.417,0.423,0.631,0.4,0.22,0.427
GME-2B,0.416,0.539,0.345,0.597,0.461,0.471,0.685,0.716,0.349,0.347,0.488
Unite-2B,0.507,0.536,0.242,0.654,0.455,0.471,0.681,0.725,0.347,0.341,0.48
VLM2Vec-V2,0.538,0.587,0.263,0.613,0.498,0.502,0.762,0.809,0.348,0.348,0.508
BGE-VL,0.48,0.497,0.268,0.622,0.448,0.406,0.636,0.664,0.292,0.261,0.443
UniME-7B,0.542,0.561,0.308,0.702,0.5,0.518,0.664,0.785,0.396,0.373,0.521
B3-7B,0.538,0.57,0.27,0.678,0.482,0.505,0.722,0.797,0.364,0.355,0.511
GME-7B,0.562,0.604,0.341,0.615,0.518,0.507,0.788,0.749,0.373,0.398,0.53
Unite-7B,0.559,0.609,0.254,0.666,0.541,0.539,0.746,0.779,0.412,0.425,0.538
GVE-3B,0.571,0.619,0.304,0.647,0.552,0.541,0.764,0.816,0.43,0.377,0.544
GVE-7B,0.6,0.657,0.312,0.657,0.587,0.57,0.814,0.821,0.469,0.419,0.573
"""

# Rows of a lower triangle, over TXT, CMP, VIS, CG, FG, LC, S, T, PR.
_CLIP_BASED = """
CMP,-0.26
VIS,-0.2,-0.71
CG,0.99,-0.12,-0.29
FG,1.0,-0.26,-0.2,0.99
LC,0.77,-0.49,0.26,0.7,0.77
S,1.0,-0.26,-0.2,0.99,1.0,0.77
T,0.43,0.2,-0.6,0.46,0.43,-0.14,0.43
PR,0.77,-0.49,0.26,0.7,0.77,1.0,0.77,-0.14
"""
_MLLM_BASED = """
CMP,-0.14
VIS,0.22,-0.11
CG,0.95,-0.04,0.36
FG,0.9,-0.08,0.55,0.97
LC,0.92,-0.18,-0.09,0.77,0.67
S,0.66,-0.05,0.48,0.61,0.64,0.54
T,0.87,0.04,0.51,0.95,0.98,0.64,0.55
PR,0.92,0.08,0.41,0.98,0.96,0.72,0.58,0.95
"""
_ALL = """
CMP,0.36
VIS,0.08,-0.2
CG,0.76,-0.04,0.1
FG,0.97,0.35,0.23,0.78
LC,0.91,0.46,-0.01,0.47,0.84
S,0.86,0.31,0.16,0.65,0.85,0.74
T,0.53,0.01,0.03,0.78,0.61,0.28,0.39
PR,0.94,0.5,0.21,0.61,0.95,0.92,0.78,0.43
"""

# The first six models of table 1, the others, and all.
GROUPS = {"clip_based": slice(0, 6), "mllm_based": slice(6, None), "all": slice(None)}
# Correlations that the paper's text states, over models that it does not name.
STATED = {
    ("msrvtt", "avg_abilities"): 0.58,
    ("PR", "avg_abilities"): 0.97,
    ("VIS", "avg_abilities"): 0.26,
    ("T", "FG"): 0.98,
    ("S", "FG"): 0.39,
    ("S", "T"): 0.12,
}


def printed_abilities():
    """Table 2, and the average over datasets of table 1, as `dict[str, dict[str, float]]` by model and name.

    >>> printed_abilities()["GVE-7B"]["avg_abilities"], printed_abilities()["GVE-7B"]["T"]
    (0.6, 0.469)
    """
    header, *rows = (line.split(",") for line in _ABILITIES.strip().splitlines())
    return {name: dict(zip(header[1:], map(float, values))) for name, *values in rows}


def printed_correlations():
    """Figure 7, as `dict[str, dict[tuple[str, str], float]]` by group of models and pair of abilities.

    >>> printed_correlations()["mllm_based"]["T", "FG"]
    0.98
    """
    triangles = {"clip_based": _CLIP_BASED, "mllm_based": _MLLM_BASED, "all": _ALL}
    return {group: _triangle(text) for group, text in triangles.items()}


def follows(printed, computed, decimals):
    """Whether `computed` rounds to `printed`, half a unit of the last of `decimals` counting for either side.

    >>> follows(0.97, 0.9657, 2), follows(0.97, 0.962, 2)
    (True, False)
    """
    return abs(printed - computed) <= 0.5 * 10**-decimals + 1e-9


def deviations(computed):
    """The cells of table 2, and of table 1's average, that do not follow, with how much the print is above.

    Args:
        computed (`dict[str, dict]`): results of `ability_scores` by model.

    Returns:
        list of `(model, name, printed, computed, difference)`, in the paper's order.
    """
    return [
        (model, name, value, computed[model][name], value - computed[model][name])
        for model, cells in printed_abilities().items()
        for name, value in cells.items()
        if not follows(value, computed[model][name], 3)
    ]


def _triangle(text):
    rows = [line.split(",") for line in text.strip().splitlines()]
    names = ["TXT", *(row[0] for row in rows)]
    return {(row[0], name): float(value) for row in rows for name, value in zip(names, row[1:])}
