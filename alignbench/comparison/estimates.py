"""What a comparison will cost, before it runs."""

import time
from pathlib import Path
from typing import NamedTuple

from alignbench.backbone import KnownDistributions
from alignbench.comparison.fronts import missing_images
from alignbench.comparison.grid import Grid, Method
from alignbench.forecast import expected_rows
from alignbench.forecast.pace import (
    Pace,
    measure_pace,
    seconds_of_a_figure,
    seconds_of_evaluations,
    seconds_per_iteration,
)
from alignbench.load import load_configured_backbone, load_configured_objective

FIGURES_OF_RUN, FIGURES_OF_REPORT = 10, 60
"""How many times as long as one figure the plots of a run take, and the report of a comparison; measured, and much the same for
any task."""


class MethodCost(NamedTuple):
    """What each cell of a method will cost, as far as it can be known."""

    method: Method
    rows: float
    """Model rows of one iteration."""
    iterations: float
    seconds: float
    """Seconds of training and evaluation, of loading the models and of drawing plots."""
    cells: int
    """Number of its cells."""


class Costs(NamedTuple):
    """What a comparison will cost."""

    methods: list[MethodCost]
    front_seconds: float
    """Seconds to compute the fronts that its folder does not have yet."""
    report_seconds: float
    """Seconds to write the report."""


def expected_costs(grid: Grid, folder: Path, workers: int = 1, *, front: bool = True) -> Costs:
    """The cost of each method and of the fronts, at the pace of the first method's model on this machine, measured now.

    Args:
        grid: the comparison.
        folder: where its fronts are kept.
        workers: processes that run cells; each evaluates the base model once.
        front: whether fronts are computed.
    """
    methods = grid.methods()
    first = methods[0].config
    began = time.perf_counter()
    policy = load_configured_backbone(first)
    loading = time.perf_counter() - began
    knows_target = isinstance(policy, KnownDistributions)
    images = missing_images(grid, folder) if front and not knows_target else 0
    pace = measure_pace(first, policy)
    loading += pace.loading
    bases = workers / max(workers, len(grid.cells()))
    figure = seconds_of_a_figure()
    costs = [_expected_cost(method, pace, loading, figure, bases) for method in methods]
    return Costs(costs, images * pace.evaluated_image, FIGURES_OF_REPORT * figure)


def _expected_cost(method: Method, pace: Pace, loading: float, figure: float, bases: float) -> MethodCost:
    config, grid = method.config, method.grid
    objective = load_configured_objective(config)
    rows = expected_rows.rows_per_iteration(config, objective)
    counted = expected_rows.model_rows(config, rows, objective.needs)
    seconds = seconds_per_iteration(config, rows, pace, objective.needs, guided=expected_rows.trains_guided(objective))
    limits = (
        (grid.budget.model_rows, counted),
        (grid.budget.reward_calls, rows.images * pace.rewards),
        (grid.budget.seconds, seconds),
    )
    trained = objective.needs.training
    iterations = min(limit / each for limit, each in limits if limit is not None) if trained else 0.0
    plots = FIGURES_OF_RUN * figure if config.save_images else 0.0
    whole = loading + iterations * seconds + seconds_of_evaluations(config, pace, iterations, bases=bases) + plots
    return MethodCost(method, counted, iterations, whole, len(grid.tasks) * len(grid.seeds))
