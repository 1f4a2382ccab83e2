from itertools import combinations
from typing import cast

import numpy as np
import pytest

from alignbench import UserError
from alignbench.load import load_eval
from evals.best_of import BestOf, best_of_k, pass_at_k


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(2, 5, 3) == pytest.approx(0.9)  # 1 - C(3, 3) / C(5, 3)
    assert pass_at_k(0, 5, 5) == 0
    assert pass_at_k(1, 5, 5) == 1
    assert pass_at_k(3, 4, 1) == pytest.approx(0.75)


def test_best_of_k_by_hand_and_over_all_subsets() -> None:
    scores = np.array([0.4, 0.1, 0.9, 0.2, 0.5])
    assert best_of_k(scores, 3) == pytest.approx(0.73)
    for k in range(1, 6):
        assert best_of_k(scores, k) == pytest.approx(np.mean([max(some) for some in combinations(scores, k)]))


def test_k_beyond_the_images_is_refused() -> None:
    with pytest.raises(UserError, match="from 1 to the number of images, 5; got 6"):
        pass_at_k(1, 5, 6)


def test_curves_leave_out_images_that_could_not_be_scored() -> None:
    metric = cast(BestOf, load_eval("best_of", eval="clip_agreement", threshold=0.5))
    found = metric.measure_read(np.array([0.2, 0.8, np.nan, 0.6]), range(4), "x")
    assert found["pass_at_1"] == pytest.approx(2 / 3)
    assert found["pass_at_2"] == pytest.approx(1)  # of three pairs none is without 0.8 and 0.6
    assert found["best_of_2"] == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    assert np.isnan(found["pass_at_4"])
