"""The backend of figures, and estimates with their intervals."""

import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from alignbench.figures.style import draw_estimates
from alignbench.records.record import Estimate
from tests.support.command_line import ROOT, in_a_process

INLINE = "module://my_inline.backend"
"""A backend like that of a notebook, which is in `matplotlib_inline`."""
SHOWN = """
import sys
sys.path.append({folder!r})
import alignbench.figures.style, matplotlib
print(dict.__getitem__(matplotlib.rcParams, "backend"))
"""


@pytest.mark.parametrize(("asked", "taken"), [(INLINE, INLINE), ("svg", "agg")])
def test_figures_need_no_display_and_a_notebook_keeps_its_backend(
    asked: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_inline").mkdir()
    (tmp_path / "my_inline" / "backend.py").write_text("from matplotlib.backends.backend_agg import *\n")
    monkeypatch.setenv("MPLBACKEND", asked)
    process = in_a_process([sys.executable, "-c", SHOWN.format(folder=str(tmp_path))], ROOT)
    assert process.stdout.strip().lower() == taken, process.stderr


@pytest.mark.parametrize("horizontal", [False, True])
def test_estimates_have_bars_and_those_without_a_value_leave_a_gap(horizontal: bool) -> None:
    rows = [(1.0, 0.5, 2.0), (None, None, None), (3.0, None, None)]
    estimates = [Estimate(value=value, lower=lower, upper=upper, n=9) for value, lower, upper in rows]
    figure, axis = plt.subplots()
    draw_estimates(axis, [10, 20, 30], estimates, horizontal=horizontal, label="some")
    [container] = axis.containers
    line, _, [bars] = container
    points = [[float(c) for c in (xy[::-1] if horizontal else xy)] for xy in line.get_xydata()]
    assert points[::2] == [[10.0, 1.0], [30.0, 3.0]]
    assert points[1][1] != points[1][1]  # NaN
    first = bars.get_segments()[0].tolist()
    assert [end[::-1] if horizontal else end for end in first] == [[10.0, 0.5], [10.0, 2.0]]
    draw_estimates(axis, [10], estimates[1:2], label="none")
    assert axis.get_legend_handles_labels()[1] == ["some"]
    plt.close(figure)
