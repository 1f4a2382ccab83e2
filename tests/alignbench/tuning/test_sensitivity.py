from typing import Any

import pytest

from alignbench.tuning.figure import draw_sensitivity
from alignbench.tuning.planning import TuningRequest
from alignbench.tuning.record import MethodRecord, TrialRecord, TuningRecord, best_first
from alignbench.tuning.sensitivity import sensitivities, trials_table
from alignbench.tuning.space import LR, UPDATES_KEY, Dimension

SPACE = [Dimension(LR, (1e-3, 1.0)), Dimension(UPDATES_KEY, (1, 2), ranged=False)]


def trial(number: int, place: float, updates: int, *scores: float | None, error: str | None = None) -> TrialRecord:
    settings: dict[str, Any] = {LR: SPACE[0].value(place), UPDATES_KEY: updates}
    where = [place, 0.0] if number else []
    return TrialRecord(trial=number, settings=settings, place=where, scores=list(scores), error=error)


def method(name: str = "a") -> MethodRecord:
    """The preset scores 0.5; the drawn trials 0.1, 0.3, 0.8 and nothing."""
    trials = [
        *(trial(0, 0.5, 1, 0.5, 0.5), trial(1, 0.1, 1, 0.0, 0.2), trial(2, 0.2, 2, 0.3, 0.3)),
        *(trial(3, 0.9, 2, 0.7, 0.9), trial(4, 0.5, 1, 9.0, None, error="it burst")),
    ]
    return MethodRecord(objective=name, sampler="independent", trials=trials)


def record(*methods: MethodRecord) -> TuningRecord:
    return TuningRecord(request=TuningRequest(), scored_by="mean validation reward (r)", prompts=4, methods=list(methods))


def test_best_and_median_are_over_trials_of_which_every_seed_has_a_score() -> None:
    found = method()
    assert [each.score for each in found.trials] == pytest.approx([0.5, 0.1, 0.3, 0.8, None])
    assert found.best is not None
    assert found.best.trial == 3
    assert found.median == pytest.approx(0.4)
    assert [each.trial for _, each in record(found).failed] == [4]


def test_scores_over_the_thirds_of_a_range_and_over_single_values() -> None:
    over_lr, over_updates = sensitivities(method(), SPACE)
    assert over_lr.means == pytest.approx({"0.001 to 0.01": 0.2, "0.01 to 0.1": float("nan"), "0.1 to 1": 0.8}, nan_ok=True)
    assert over_updates.means == pytest.approx({"1": 0.1, "2": 0.55})


def test_methods_are_ordered_by_the_preset_or_by_their_best_trial() -> None:
    other = MethodRecord(objective="b", sampler="independent", trials=[trial(0, 0.5, 1, 0.6), trial(1, 0.1, 1, 0.7)])
    assert [each.objective for each in best_first([method(), other], trial=0)] == ["b", "a"]
    assert [each.objective for each in best_first([method(), other])] == ["a", "b"]


def test_the_table_has_a_row_for_each_trial() -> None:
    table = trials_table(record(method()))
    assert list(table.columns) == ["objective", "sampler", "trial", LR, UPDATES_KEY, "score", "seeds", "error"]
    assert table["score"].tolist() == pytest.approx([0.5, 0.1, 0.3, 0.8, float("nan")], nan_ok=True)
    assert table["seeds"].tolist() == [2, 2, 2, 2, 1]


@pytest.mark.usefixtures("laid_out")
def test_the_plot_has_a_panel_for_each_method_and_setting_with_readable_ticks() -> None:
    figure = draw_sensitivity(record(method("a"), method("b")))
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == [LR, UPDATES_KEY] * 2
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0.002", "0.032", "0.5"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["1", "2"]
    by_label = {line.get_label(): line for line in panels[0].get_lines()}
    assert set(by_label) == {"trial", "preset", "best", "median"}
    assert float(by_label["best"].get_ydata()[0]) == pytest.approx(0.8)  # type: ignore[index,arg-type]
