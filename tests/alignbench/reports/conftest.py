"""What tests of reports share."""

import pytest

from alignbench.reports import report


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a page says: plots take most of a report's time."""
    monkeypatch.setattr(report, "draw_plots", lambda *_: report.Plots())
