"""What a comparison will cost, before it runs."""

from typing import NamedTuple

from alignbench.comparison.grid import Grid, Method
from alignbench.forecast import costs, expected_rows
from alignbench.load import load_configured_backbone, load_configured_objective


class MethodCost(NamedTuple):
    """What each cell of a method will cost, as far as it can be known."""

    method: Method
    rows: float
    """Model rows of one iteration."""
    iterations: float
    seconds: float
    """Seconds of training and evaluation."""
    cells: int
    """Number of its cells."""


def expected_costs(grid: Grid) -> list[MethodCost]:
    """The cost of each method, from model rows and images of the first method's model that are timed now, on this machine."""
    methods = grid.methods()
    first = methods[0].config
    pace = costs.measure_pace(first, load_configured_backbone(first))
    return [_expected_cost(method, pace) for method in methods]


def _expected_cost(method: Method, pace: costs.Pace) -> MethodCost:
    config, grid = method.config, method.grid
    objective = load_configured_objective(config)
    rows = expected_rows.rows_per_iteration(config, objective)
    counted = expected_rows.model_rows(config, rows, objective.needs)
    seconds = costs.seconds_per_iteration(config, rows, pace, objective.needs, guided=expected_rows.trains_guided(objective))
    limits = (
        (grid.budget.model_rows, counted),
        (grid.budget.reward_calls, rows.images * pace.rewards),
        (grid.budget.seconds, seconds),
    )
    iterations = min(limit / each for limit, each in limits if limit is not None)
    whole = iterations * seconds + costs.seconds_per_evaluation(config, pace)
    return MethodCost(method, counted, iterations, whole, len(grid.tasks) * len(grid.seeds))
