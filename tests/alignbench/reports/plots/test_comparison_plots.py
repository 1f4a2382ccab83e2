"""Figures of comparisons of many methods have room for their axes and labels."""

from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.comparison.reading import read_results
from alignbench.reports.plots.comparison_plots import comparison_figures
from tests.alignbench.record_folders import write_run


def trade_off(folder: Path, methods: int) -> Figure:
    for i in range(methods):
        write_run(folder / f"r{i}", objective=f"method{i}", reward=(0.5 + 0.01 * i, 0.7), lgmd=(0.3, 0.4))
    figure = comparison_figures(read_results(folder), "ocr on tiny")["trade_off"]
    figure.canvas.draw()
    return figure


@pytest.mark.usefixtures("laid_out")
def test_axes_keep_their_height_however_many_methods_a_legend_names(tmp_path: Path) -> None:
    few, many = trade_off(tmp_path / "few", 4), trade_off(tmp_path / "many", 32)
    heights = [float(figure.axes[0].get_window_extent().height) / figure.dpi for figure in (few, many)]
    # In inches; the legend's eleven lines instead of four would take nearly one.
    assert heights[1] == pytest.approx(heights[0], abs=0.2)
    label = many.axes[0].yaxis.label.get_window_extent()
    assert 0 <= label.y0 <= label.y1 <= many.bbox.height
    plt.close("all")
