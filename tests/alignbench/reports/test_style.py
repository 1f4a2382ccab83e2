"""Legends of a comparison's figures."""

import pytest
from matplotlib import pyplot as plt

from alignbench.comparison.results import BASE
from alignbench.reports.style import PAPER, Look, add_legend

pytestmark = pytest.mark.usefixtures("laid_out")


@pytest.mark.parametrize("objectives", [["tmpo", "grpo"], [f"grpo(kl_beta={value},optimizer.lr=0.0001)" for value in range(9)]])
def test_a_legend_fits_into_its_figure(objectives: list[str]) -> None:
    look = {f"{name} x dynamic_tree": Look("#000000", "o", "-") for name in objectives} | {BASE: Look("#000000", "*", "-")}
    with plt.rc_context(PAPER):
        figure, _ = plt.subplots(figsize=(3.3, 3.0), layout="constrained")
        add_legend(figure, look, front=True, title="means")
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    plt.close(figure)
