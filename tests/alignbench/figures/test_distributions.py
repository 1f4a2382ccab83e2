"""Distributions as tables and figures, on distributions of a few points."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench import load_backbone
from alignbench.backbone import KnownDistributions, PointDistribution
from alignbench.config.run_config import load_config
from alignbench.figures import distributions
from alignbench.figures.distributions import PIXELS, over_training, side_by_side
from alignbench.figures.plots import plot_run
from alignbench.records.distributions import TARGET, as_rows, mode_masses, read_distributions
from alignbench.training.progress import Reporting
from alignbench.training.run import run

pytestmark = pytest.mark.usefixtures("laid_out")
CORNERS = np.array([[-3.0, -3.0], [3.0, -3.0], [3.0, 3.0]])


def distribution(*mass: float) -> PointDistribution:
    return PointDistribution(CORNERS, np.array(mass), np.array([0, 1, 2]))


def three_distributions() -> pd.DataFrame:
    parts = [
        as_rows(distribution(0.5, 0.5, 0.0), TARGET),
        as_rows(distribution(0.25, 0.25, 0.5), 0),
        as_rows(distribution(1.0, 0.0, 0.0), 9),
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_mass_of_each_mode_is_that_of_its_points() -> None:
    found = mode_masses(three_distributions())
    assert found["target"].tolist() == [0.5, 0.5, 0.0]
    assert found["base"].tolist() == [0.25, 0.25, 0.5]
    assert found["trained"].tolist() == [1.0, 0.0, 0.0]


def test_a_panel_keeps_the_mass_and_its_place() -> None:
    picture = distributions._density(as_rows(distribution(0.7, 0.3, 0.0), 1), half=6.0)
    assert picture.shape == (PIXELS, PIXELS)
    pixel = 12.0 / PIXELS
    assert float(picture.sum()) * pixel**2 == pytest.approx(1.0, abs=1e-6)
    half = PIXELS // 2
    assert float(picture[:half, :half].sum()) * pixel**2 == pytest.approx(0.7, abs=1e-6)  # low y, low x
    assert float(picture[:half, half:].sum()) * pixel**2 == pytest.approx(0.3, abs=1e-6)
    # A point mass m becomes a Gaussian, whose height is m / (2 pi s^2); the pixel's own width lowers it a little.
    assert float(picture.max()) == pytest.approx(0.7 / (2 * np.pi * distributions.SMOOTHING**2), rel=0.15)


def test_the_frame_holds_the_base_model() -> None:
    assert distributions.frame_of(as_rows(distribution(0.3, 0.3, 0.4), 0)) == pytest.approx(3.3)
    far = PointDistribution(np.array([[0.0, 1.0], [50.0, 0.0]]), np.array([0.9999, 0.0001]), np.array([0, 0]))
    assert distributions.frame_of(as_rows(far, 0)) == pytest.approx(1.1)


def test_a_figure_has_a_panel_for_each_distribution_and_one_for_the_modes() -> None:
    figure = over_training(three_distributions(), "a title")
    assert [axis.get_title() for axis in figure.axes] == ["target", "base", "iteration 9", ""]
    assert figure.axes[-1].get_xlabel() == "mode"
    plt.close(figure)


def test_a_long_training_goes_on_in_a_second_row() -> None:
    kept = pd.concat(
        [three_distributions(), *(as_rows(distribution(1.0, 0.0, 0.0), 10 * i) for i in range(1, 10))], ignore_index=True
    )
    figure = over_training(kept, "a title")
    axes: Any = figure.axes
    *panels, bars = axes
    tops = [round(axis.get_subplotspec().get_position(figure).y1, 3) for axis in panels]
    assert [tops.count(top) for top in dict.fromkeys(tops)] == [6, 6]
    assert figure.get_size_inches()[0] == pytest.approx(distributions.WIDTH)
    assert [label.get_text() for label in bars.get_xticklabels()] == ["0", "1", "2"]
    plt.close(figure)


def places(figure: Figure) -> list[tuple[int, int]]:
    """The row and column of each panel beside target and base, by where they are on the page."""
    boxes = [axis.get_position() for axis in figure.axes[2:]]
    tops = sorted({round(box.y0, 6) for box in boxes}, reverse=True)
    lefts = sorted({round(box.x0, 6) for box in boxes})
    return [(tops.index(round(box.y0, 6)), lefts.index(round(box.x0, 6))) for box in boxes]


def test_side_by_side_is_a_row_a_sampler_and_a_column_an_objective() -> None:
    tables = {(o, s): three_distributions() for o in ("tmpo", "part: grpo", "nft") for s in ("independent", "fixed_tree")}
    del tables["nft", "fixed_tree"]
    tables["nft", "sliding_window"] = three_distributions()
    figure = side_by_side(tables, "equal_modes")
    assert [axis.get_ylabel() for axis in figure.axes[:2]] == ["target", "base"]
    assert places(figure) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2)]
    assert [axis.get_title() for axis in figure.axes[2:]] == ["tmpo", "part: grpo", "nft", "", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes[2:]] == ["independent", "", "", "fixed tree", "", "sliding window"]
    plt.close(figure)


def test_objectives_that_share_no_sampler_are_in_rows_of_their_own() -> None:
    pairs = [("tmpo", "independent"), ("ftb", "independent"), ("one: tmpo", "fixed_tree"), ("crd", "published")]
    figure = side_by_side({pair: three_distributions() for pair in pairs}, "equal_modes")
    assert places(figure) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [axis.get_title() for axis in figure.axes[2:]] == ["tmpo", "ftb", "one: tmpo", "crd"]
    assert [axis.get_ylabel() for axis in figure.axes[2:]] == ["independent", "", "fixed tree", "published"]
    boxes = [axis.get_position() for axis in figure.axes]
    assert boxes[1].y0 == pytest.approx(boxes[4].y0)  # the base model is beside the second row
    assert min(box.y0 for box in boxes) > -1e-9  # float64 sums of inches
    plt.close(figure)


def test_many_objectives_go_on_below() -> None:
    figure = side_by_side(
        {(f"variant_number_{i}: tmpo", "independent"): three_distributions() for i in range(distributions.COLUMNS + 2)}, "all"
    )
    assert figure.axes[-1].get_title() == "variant\nnumber 13:\ntmpo"
    assert places(figure) == [(row, column) for row in range(2) for column in range(7)]  # two rows of seven
    plt.close(figure)


def test_the_points_of_a_law_have_the_moments_of_samples() -> None:
    policy = load_backbone("gaussian_mixture", device="cpu", steps=64)
    assert isinstance(policy, KnownDistributions)
    found = policy.distribution("rare_mode 0")
    assert found is not None
    assert found.mass.sum() == pytest.approx(1.0)
    # The rare mode has 0.02 of a weight of 1.02; 4096 points, and a distribution of 64 Euler steps.
    assert found.mass[found.mode == 0].sum() == pytest.approx(0.02 / 1.02, abs=0.004)
    assert (found.mass[:, None] * found.points**2).sum() == pytest.approx(9 + 2 * 0.45**2, abs=0.25)  # Euler steps


def known(**settings: float) -> KnownDistributions:
    policy = load_backbone("gaussian_mixture", device="cpu", **settings)
    assert isinstance(policy, KnownDistributions)
    return policy


def test_the_target_is_the_base_tilted_by_the_reward() -> None:
    found = known(beta=0.0).target_distribution("unequal_modes 1")
    assert found is not None
    assert found.mass.sum() == pytest.approx(1.0)
    shares = np.bincount(found.mode, weights=found.mass)
    assert shares == pytest.approx(np.full(6, 1 / 6), abs=1e-3)  # beta 0: the base model, cut off at next to nothing
    tilted = known(beta=4.0).target_distribution("unequal_modes 0")
    assert tilted is not None
    of_mode = np.bincount(tilted.mode, weights=tilted.mass)
    assert list(np.argsort(-of_mode)) == [0, 1, 2, 3, 4, 5]


def test_a_run_keeps_its_laws_and_draws_them_also_when_it_is_resumed(tmp_path: Path) -> None:
    options = {"backbone": "gaussian_mixture", "objective": "grpo", "sampler": "independent"}
    sets = ["backbone.quadrature=10", "threads=1", "evaluation.images_per_prompt=4", "evaluation.prompts=2"]
    sets += ["snapshots=2", "iterations=6", "checkpoint_every=3"]
    config = load_config(preset="smoke", options=options, sets=sets)
    run(config, tmp_path / "whole")
    kept = read_distributions(tmp_path / "whole")
    assert kept is not None
    assert list(kept["iteration"].unique()) == [TARGET, 0, 2, 4, 6]
    metrics = pd.read_parquet(tmp_path / "whole" / "metrics.parquet")
    assert metrics["iteration"][metrics["measured_kl_base"].notna()].tolist() == [1, 3]
    assert tmp_path / "whole" / "plots" / "distributions.png" in plot_run(tmp_path / "whole")

    def stop(row: dict[str, object], progress: float) -> None:
        if progress > 0.6:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        run(config, tmp_path / "stopped", console=Reporting(stop))  # after the fourth iteration; the checkpoint is of the third
    run(config, tmp_path / "stopped", resume=True)
    again = read_distributions(tmp_path / "stopped")
    assert again is not None
    pd.testing.assert_frame_equal(again, kept, check_exact=True)


def test_backbones_of_images_have_no_distributions(tmp_path: Path) -> None:
    assert read_distributions(tmp_path) is None
