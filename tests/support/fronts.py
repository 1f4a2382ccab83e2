"""Fronts made by hand."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from alignbench.frontier.front import COLUMNS, TILT, Front, FrontRecord


def hand_made_front(metrics: Mapping[str, ArrayLike]) -> Front:
    """A front of tilts at beta = 0, 1, 2, ...

    Args:
        metrics: metric -> its values, float [S, P], one for each beta and prompt.
    """
    values = {name: np.asarray(of_metric, dtype=np.float64) for name, of_metric in metrics.items()}
    strengths, prompts = next(iter(values.values())).shape
    rows = [
        (TILT, float(s), p, f"prompt {p}", name, float(of_metric[s, p]))
        for name, of_metric in values.items()
        for s in range(strengths)
        for p in range(prompts)
    ]
    record = FrontRecord(
        key="", task="t", backbone="b", prompts=prompts, images=64, set_size=4, steps=8, guidance=1.0,
        noise_seed=0, rewards={"r": 1.0}, normalised=False, reward_deviation=0.1,
    )  # fmt: skip
    return Front(record, pd.DataFrame(rows, columns=COLUMNS))
