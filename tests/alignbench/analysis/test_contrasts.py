"""Differences with the seed as the unit, by hand-computed numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignbench.analysis.contrasts import (
    at_kl,
    equal_kl_frame,
    families,
    first_crossing,
    means_frame,
    method_frame,
    over_tasks,
    sampler_frame,
    values_frame,
)
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE
from tests.alignbench.record_folders import write_run


def table(rows: list[tuple[str, str, str, str, int, float]]) -> pd.DataFrame:
    """Rows (part, setup, objective, sampler, seed, value of the metric `js`)."""
    frame = pd.DataFrame(rows, columns=["part", "setup", "objective", "sampler", "seed", "js"])
    cells = [BASE if o == BASE else f"{p}: {o} x {s}" for p, o, s in frame[["part", "objective", "sampler"]].to_numpy()]
    return frame.assign(cell=cells)


def test_means_over_tasks_need_all_tasks_of_a_seed() -> None:
    runs = table([("p", t, "o", "s", seed, value) for t, seed, value in (("a", 0, 1.0), ("b", 0, 2.0), ("a", 1, 3.0))])
    means = over_tasks(runs, ["js"])
    assert means[["seed", "js"]].to_numpy().tolist() == [[0, 1.5]]


def test_methods_are_tested_against_the_base_model() -> None:
    better = [("p", "a", "o", "s", seed, value) for seed, value in enumerate([1.5, 1.6, 1.7])]
    same = [("p", "a", "dull", "s", seed, 1.0) for seed in range(3)]
    runs = table([("", "a", BASE, "", -1, 1.0), *better, *same])
    frame: Any = means_frame(over_tasks(runs, ["js"]), ["js"]).set_index("objective")
    # Differences 0.5, 0.6, 0.7: mean 0.6, standard error 0.1 / sqrt 3, t = 10.392 with two degrees of freedom.
    assert frame.loc["o", "p"] == pytest.approx(0.00913, abs=1e-4)
    # Student's t(0.975, 2) = 4.302653.
    assert frame.loc["o", "upper"] == pytest.approx(1.6 + 4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert np.isnan(frame.loc["dull", "p"])  # without spread there is no test, and none that counts for Holm
    assert frame.loc["o", "p_holm"] == frame.loc["o", "p"]
    assert (frame.loc[BASE, "value"], frame.loc[BASE, "n"]) == (1.0, 0)


def test_samplers_are_compared_seed_by_seed() -> None:
    values = {("x", 0): 1.0, ("x", 1): 2.0, ("x", 2): 4.0, ("y", 0): 1.5, ("y", 1): 2.6, ("y", 2): 4.7}
    runs = table([("p", "a", "o", sampler, seed, value) for (sampler, seed), value in values.items()])
    (row,) = sampler_frame(over_tasks(runs, ["js"]), ["js"]).to_dict("records")
    assert (row["first"], row["second"], row["metric"], row["n"]) == ("x", "y", "js", 3)
    assert row["value"] == pytest.approx(0.6)
    assert row["p"] == pytest.approx(0.00913, abs=1e-4)
    assert row["p_holm"] == row["p"]


def test_methods_are_compared_with_the_first_one_that_has_the_same_sampler() -> None:
    of_method = {("all", "o"): (1.0, 2.0, 4.0), ("all", "other"): (1.5, 2.6, 4.7), ("changed", "o"): (0.9, 2.0, 4.3)}
    rows = [
        (part, "a", objective, sampler, seed, value + shift)
        for (part, objective), values in of_method.items()
        for sampler, shift in (("x", 0.0), ("y", 10.0))
        for seed, value in enumerate(values)
        if (objective, sampler, seed) != ("other", "y", 2)
    ]
    means = over_tasks(table([("", "a", BASE, "", -1, 9.0), *rows]), ["js"])
    frame: Any = method_frame(means, ["js"]).set_index(["part", "objective", "sampler"])
    assert list(frame.index) == [(*m, sampler) for m in (("all", "other"), ("changed", "o")) for sampler in ("x", "y")]
    assert frame["value"].tolist() == pytest.approx([0.6, 0.55, 0.2 / 3, 0.2 / 3])
    assert frame["n"].tolist() == [3, 2, 3, 3]  # a seed that one of the two lacks is no pair
    assert frame.loc[("all", "other", "x"), "p_holm"] == pytest.approx(4 * frame.loc[("all", "other", "x"), "p"])


def test_the_first_crossing_is_interpolated() -> None:
    path = np.array([[0.0, 10.0], [1.0, 20.0], [0.5, 0.0], [3.0, 50.0]])
    assert first_crossing(path, 0.5).tolist() == [0.5, 15.0]
    assert first_crossing(path, 2.0).tolist() == pytest.approx([2.0, 30.0])  # between 0.5 and 3: 0.6 of the way
    assert np.isnan(first_crossing(path, 4.0)).all()
    assert first_crossing(np.array([[0.3, 10.0], [1.0, 20.0]]), 0.2).tolist() == [0.3, 10.0]


def test_a_level_that_was_leapt_over_was_not_seen() -> None:
    path = np.array([[0.01, 10.0], [4.0, 20.0]])
    assert np.isnan(first_crossing(path, 0.3)).all()
    assert np.isnan(first_crossing(path, 1.9)).all()
    assert first_crossing(path, 2.1).tolist() == pytest.approx([2.1, 10 + 10 * 2.09 / 3.99])  # 4 is within a factor of two
    assert first_crossing(path, 0.02).tolist() == pytest.approx([0.02, 10 + 10 * 0.01 / 3.99])


def with_kl(folder: Path, snapshots: list[float]) -> None:
    """Turns a run's LGMD into `kl_base`, with snapshots of it and of the reward 0.6."""
    file = folder / "result.json"
    file.write_text(file.read_text().replace('"lgmd"', '"kl_base"'))
    metrics = pd.read_parquet(folder / "metrics.parquet")
    padded = [*snapshots, *[np.nan] * (len(metrics) - len(snapshots))]
    values = {"measured_kl_base": padded, "measured_ocr": [0.6 if kl == kl else np.nan for kl in padded]}
    metrics.assign(**values).to_parquet(folder / "metrics.parquet")


def test_equal_kl_counts_the_runs_that_were_seen_there(tmp_path: Path) -> None:
    # The base model has a KL of 0.45 and a reward of 0.45; the runs end at KL 1 and 0.5 with reward 0.8.
    for seed, (end, snapshots) in enumerate([(1.0, [0.7]), (0.5, [0.48])]):
        with_kl(write_run(tmp_path / str(seed), seed=seed, reward=(0.8, 0.8), lgmd=(end, end)), snapshots)
    results = read_results(tmp_path)
    results.kl_levels = [0.47, 0.85]
    (family,) = families(results)
    values = values_frame(results, family)
    at = at_kl(results, family, values)
    # A metric that snapshots do not measure is left out, and not the runs.
    pd.testing.assert_frame_equal(at_kl(results, family, values.assign(vendi=1.0)), at)
    assert at["kl"].tolist() == [0.47, 0.85] * 2
    frame: Any = equal_kl_frame(at).set_index("kl")
    # At 0.47: 0.08 and 2/3 of the way from the base model to the snapshot; at 0.85 half-way from the snapshot to the end.
    assert frame.loc[0.47, "value"] == pytest.approx((0.45 + 0.08 * 0.15 + 0.45 + 2 / 3 * 0.15) / 2)
    assert (frame.loc[0.47, "n"], frame.loc[0.47, "runs"]) == (2, 2)
    assert frame.loc[0.85, "value"] == pytest.approx(0.7)
    assert (frame.loc[0.85, "n"], frame.loc[0.85, "runs"]) == (1, 2)
    assert frame["metric"].tolist() == ["ocr", "ocr"]
    results.kl_levels = []
    assert equal_kl_frame(at_kl(results, family, values_frame(results, family))).empty


def test_setups_that_differ_in_the_task_alone_are_a_family(tmp_path: Path) -> None:
    for number, (task, steps) in enumerate([("ocr", 8), ("counting", 8), ("ocr", 16)]):
        file = write_run(tmp_path / str(number), steps=steps) / "result.json"
        file.write_text(file.read_text().replace('"task":"ocr"', f'"task":"{task}"'))
    results = read_results(tmp_path)
    assert [(family.name, family.setups) for family in families(results)] == [
        ("2 tasks on tiny", ["ocr on tiny", "counting on tiny"]),
        ("ocr on tiny (2)", ["ocr on tiny (2)"]),
    ]
