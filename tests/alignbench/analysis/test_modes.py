from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignbench.analysis.modes import TARGET, first_distributions, modes_frame
from alignbench.backbone import PointDistribution
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE
from alignbench.records import distributions
from tests.alignbench.record_folders import write_run


def test_the_mass_of_each_mode_is_a_mean_over_seeds(tmp_path: Path) -> None:
    for seed, first_mode in enumerate([0.9, 0.6]):
        folder = write_run(tmp_path / f"r{seed}", seed=seed)
        points, modes = np.zeros((2, 2)), np.array([0, 1])
        masses = ((distributions.TARGET, 0.5), (0, 0.2), (7, first_mode))
        parts = [distributions.as_rows(PointDistribution(points, np.array([m, 1 - m]), modes), at) for at, m in masses]
        pd.concat(parts).to_parquet(folder / distributions.FILE)
    write_run(tmp_path / "unknown", objective="grpo")
    results = read_results(tmp_path)
    frame: Any = modes_frame(results, "ocr on tiny").set_index(["cell", "mode"])
    cell = "tmpo x independent"
    assert [frame.loc[(name, 0), "value"] for name in (TARGET, BASE, cell)] == pytest.approx([0.5, 0.2, 0.75])
    assert frame.loc[(cell, 1), "value"] == pytest.approx(0.25)
    assert [frame.loc[(name, 0), "n"] for name in (TARGET, BASE, cell)] == [0, 0, 2]
    # Student's with one degree of freedom: t(0.975) = 12.7062, standard error 0.15, so the half-width is 1.906. Masses lie
    # in [0, 1]: at distances of 0.25 and 0.75, the ends are 0.25 exp(-1.906 / 0.25) and 0.75 exp(-1.906 / 0.75) from there.
    assert frame.loc[(cell, 0), "upper"] == pytest.approx(1 - 0.25 * np.exp(-1.90593 / 0.25), abs=1e-6)
    assert frame.loc[(cell, 0), "lower"] == pytest.approx(0.75 * np.exp(-1.90593 / 0.75), abs=1e-6)
    assert list(first_distributions(results, "ocr on tiny")) == [cell]
    (tmp_path / "r0" / distributions.FILE).write_text("damaged")
    assert len(modes_frame(results, "ocr on tiny")) == 6
    modes_frame(results, "ocr on tiny")
    assert len(results.unreadable) == 1  # one line, however often it is read
