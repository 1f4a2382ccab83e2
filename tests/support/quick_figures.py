"""Lets tests draw figures without matplotlib's search for places without overlap, which takes more than half of their time.

The fixture `laid_out` brings it back for tests of figures.
"""

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

lay_out = ConstrainedLayoutEngine.execute


def leave_as_it_is(engine: ConstrainedLayoutEngine, fig: Figure) -> None:
    """Leaves the axes where `plt.subplots` puts them."""


ConstrainedLayoutEngine.execute = leave_as_it_is  # type: ignore[method-assign, assignment]
