"""The animation of distributions, on distributions of a few points."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageSequence

from alignbench.backbone import PointDistribution
from alignbench.figures.animation import DURATION, LAST, write_animation
from alignbench.records.distributions import TARGET, as_rows

pytestmark = pytest.mark.usefixtures("laid_out")
CORNERS = np.array([[-3.0, -3.0], [3.0, -3.0]])


def table(*iterations: int) -> pd.DataFrame:
    """The target has its mass on the left; a model has moved all of its mass there by iteration 9."""
    parts = [as_rows(PointDistribution(CORNERS, np.array([1.0, 0.0]), np.array([0, 1])), TARGET)]
    for i in iterations:
        mass = np.array([0.5 + i / 18, 0.5 - i / 18])
        parts.append(as_rows(PointDistribution(CORNERS, mass, np.array([0, 1])), i))
    return pd.concat(parts, ignore_index=True)


def test_a_frame_for_each_iteration_and_a_panel_for_each_model(tmp_path: Path) -> None:
    write_animation({"quick": table(0, 9), "slow": table(0, 3, 9)}, tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(float).sum(2) for frame in ImageSequence.Iterator(gif)]
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert durations == [DURATION, DURATION, LAST]
    left, right = [], []
    for frame in frames:
        third = frame.shape[1] // 3
        panels = [frame[20:-20, i * third + 8 : (i + 1) * third - 8] for i in range(3)]  # without titles and margins
        left.append([panel[:, : panel.shape[1] // 2].mean() for panel in panels])
        right.append([panel[:, panel.shape[1] // 2 :].mean() for panel in panels])
    bright = np.array(left) - np.array(right)  # how much brighter the left half of target, quick and slow is
    assert np.ptp(bright[:, 0]) < 0.2  # the target stands still, but for the palette
    assert abs(bright[0, 1]) < 0.2  # the base model has as much on both sides
    assert abs(bright[1, 1] - bright[0, 1]) < 0.2  # no table at iteration 3, so that it keeps its last
    assert bright[1, 2] > bright[0, 2] + 0.5
    assert bright[2, 1] > bright[1, 1] + 0.5
