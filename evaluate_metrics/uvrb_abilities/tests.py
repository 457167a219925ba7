"""Hand-worked cases of `uvrb_abilities`: inputs of `compute` and some of what it must return."""

ONES = ("msrvtt", "crb_s", "crb_t", "lovr_th", "vdc_d", "ms_ti")
ZEROS = ("didemo", "crb_g", "vdc_o", "cmrb", "dream_e", "pev_k", "lovr_v", "ms_tv", "msrvtt_i2v", "lovr_c2v")

test_cases = [
    {  # equal scores: every mean is that score
        "inputs": {"scores": dict.fromkeys(ONES + ZEROS, 0.25)},
        "result": {"TXT": 0.25, "FG": 0.25, "PR": 0.25, "avg_abilities": 0.25, "avg_datasets": 0.25},
    },
    {  # S = T = LC = CMP = 1/2, CG = PR = 1/3, FG = (1/2 + 1/2 + 1/3) / 3 = 4/9, TXT = (1/3 + 4/9 + 1/2) / 3 = 23/54
        "inputs": {"scores": {**dict.fromkeys(ONES, 1), **dict.fromkeys(ZEROS, 0)}},
        "result": {
            "S": 1 / 2,
            "T": 1 / 2,
            "PR": 1 / 3,
            "CG": 1 / 3,
            "FG": 4 / 9,
            "LC": 1 / 2,
            "TXT": 23 / 54,
            "CMP": 1 / 2,
            "VIS": 0,
            "avg_abilities": (23 / 54 + 1 / 2 + 0 + 1 / 3 + 4 / 9 + 1 / 2) / 6,
            "avg_datasets": 6 / 16,
        },
    },
    {  # two datasets: only their own ability is known
        "inputs": {"scores": {"ms_ti": 0.3, "ms_tv": 0.5}},
        "result": {"CMP": 0.4, "TXT": None, "avg_abilities": None, "avg_datasets": None},
    },
]
