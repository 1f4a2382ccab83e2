import pytest

from alignbench import UserError
from alignbench.runtime import launch, variables
from alignbench.training.tracking import check_trackers


def test_a_misspelt_variable_of_ours_is_told_with_the_right_name(monkeypatch: pytest.MonkeyPatch) -> None:
    variables.check()
    monkeypatch.setenv("ALIGNBENCH_SCORER_TOKN", "x")
    with pytest.raises(UserError, match="variable ALIGNBENCH_SCORER_TOKN; did you mean 'ALIGNBENCH_SCORER_TOKEN'"):
        variables.check()


@pytest.mark.parametrize("value", ["two", "-1", "0", "1.5", "９", "9" * 20])
def test_a_launchers_variable_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match=f"WORLD_SIZE='{value}', which must be a whole number of at least 1; unset it"):
        launch.count()
    monkeypatch.setenv("WORLD_SIZE", " ")
    assert launch.count() == 1


def test_a_mode_of_wandb_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE is 'ofline'; did you mean 'offline'"):
        check_trackers(["wandb"])
    check_trackers([])
