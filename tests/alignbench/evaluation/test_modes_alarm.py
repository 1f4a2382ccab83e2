"""The alarm about modes that died, on shares by hand."""

import pandas as pd
import pytest

from alignbench.evaluation.alarm import about_dead_modes, mode_alarms


def evals(base: list[float], final: list[float], metric: str = "modes_covered") -> pd.DataFrame:
    rows = [
        {"phase": phase, "prompt_index": prompt, "prompt": f"scenario {prompt}", "metric": metric, "value": share}
        for phase, shares in (("base", base), ("final", final))
        for prompt, share in enumerate(shares)
    ]
    return pd.DataFrame(rows)


def test_modes_that_died_for_any_prompt_are_told() -> None:
    """All keep their modes for the first prompt, whose distribution is drawn, and lose two of three for the second."""
    (alarm,) = mode_alarms(evals([1, 1, 0.5], [1, 1 / 3, 1]))
    assert alarm == (
        "modes of the target died for 1 of 3 prompts: on average the base model draws 83 % of a target's modes, the trained "
        "model 78 %"
    )
    assert about_dead_modes(alarm)
    assert about_dead_modes("1 of the target's 3 modes died for the prompt 'equal_modes 0': the target has 0.4")  # 0.1's


@pytest.mark.parametrize("final", [[1, 1, 0.5], [1, 1, 1]])
def test_modes_that_are_kept_or_won_raise_none(final: list[float]) -> None:
    assert mode_alarms(evals([1, 1, 0.5], final)) == []


def test_without_known_modes_there_is_no_such_alarm() -> None:
    assert mode_alarms(evals([1, 1], [0, 0], metric="mode_coverage")) == []
