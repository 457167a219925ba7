"""Shares of the steps and scores: a linear truth is found, noise is not taken for one."""

import json

import numpy as np
import pytest
import yaml

from training import ablation, mixture


def test_a_linear_truth_is_found():
    generator = np.random.default_rng(0)
    shares = generator.dirichlet([5, 5, 5], size=40)
    truth = np.array([0.2, 0.5, 0.8])
    slopes, errors, explained = mixture.fit_shares(shares, shares @ truth)
    # 10% more of a task is 5% less of each of the two others.
    assert slopes == pytest.approx([0.1 * 0.2 - 0.05 * 1.3, 0, 0.1 * 0.8 - 0.05 * 0.7])
    assert explained == pytest.approx(1) and errors.max() < 1e-9

    noise = generator.normal(size=40)
    slopes, errors, explained = mixture.fit_shares(shares, noise)
    assert abs(explained) < 0.2 and (np.abs(slopes) < 4 * errors).all()
    with pytest.raises(ValueError, match="3 runs are too few to tell 3 tasks apart"):
        mixture.fit_shares(shares[:3], noise[:3])


def test_report_takes_runs_that_differ_in_the_draws_only(tmp_path):
    sweep = {"recipe": "r", "benchmark": "b", "shared": {"epochs": 1}, "studies": {}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    words = ["--sweep", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path)]
    with pytest.raises(ValueError, match="no finished runs in"):
        mixture.main(words)
    (tmp_path / "runs").mkdir()
    for number in range(7):
        settings = {"epochs": 1, "seed": number} | ({"symmetric": False} if number == 6 else {})
        batches = {"t2v": 10 + number, "v2v": 10 - number}
        run = {"settings": settings, "batches": batches, "abilities": dict.fromkeys(ablation.ABILITIES, number / 10)}
        (tmp_path / f"runs/{number}.json").write_text(json.dumps(run))
    mixture.main(words)
    table = (tmp_path / "mixture.md").read_text()
    assert table.startswith("6 runs.") and "| t2v | 0.50 to 0.75 | +0.200 ± 0.000 |" in table
