"""The alarm about modes that died, on masses by hand."""

import pandas as pd
import pytest

from alignbench.evaluation.alarm import dead_modes, mode_alarms

MASSES = pd.DataFrame(
    {"target": [0.5, 0.4, 0.06, 0.04], "base": [0.25, 0.25, 0.01, 0.25], "trained": [0.9, 0.09, 0.0, 0.0]},
)


def test_a_mode_died_where_the_trained_model_has_under_a_quarter_of_it() -> None:
    """The second has 0.09 of 0.4; the third was not alive in the base model; the fourth does not count in the target."""
    assert list(dead_modes(MASSES).index) == [1]
    (alarm,) = mode_alarms(MASSES, "equal_modes 0")
    assert alarm == (
        "1 of the target's 3 modes died for the prompt 'equal_modes 0': the target has 0.4 of its mass there, "
        "the trained model 0.09"
    )


@pytest.mark.parametrize("trained", [[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
def test_a_mode_that_keeps_a_quarter_of_its_mass_raises_none(trained: list[float]) -> None:
    assert mode_alarms(MASSES.assign(trained=trained), "equal_modes 0") == []
