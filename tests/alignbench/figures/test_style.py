"""The backend of figures."""

import sys
from pathlib import Path

import pytest

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
