"""How long a training is: rules that end it early, and whether a longer one continues it; and its best checkpoint.

Stop rules and the best checkpoint read the evaluations along the training. Each decision is a function of the curve alone, so
a resumed run and all ranks come to the same one.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from alignbench.backbone import Backbone, KnownDistributions
from alignbench.config.run_config import BudgetConfig, RunConfig, StopConfig
from alignbench.errors import UserError, did_you_mean
from alignbench.evaluation.curve import PATH_KL
from alignbench.objective import Objective
from alignbench.records.record import StopRecord
from alignbench.sampler import Sampler


class StopRules:
    """The rules of one run, and its `best_by`.

    Attributes:
        needs_checkpoints: whether a checkpoint must be written at each evaluation.
    """

    def __init__(self, config: RunConfig, directions: Mapping[str, bool | None]) -> None:
        """Checks the metrics that are named.

        Args:
            directions: metric of an evaluation -> whether higher is better, None where neither is.

        Raises:
            UserError: there is no such metric, or it cannot serve for its purpose.
        """
        self.stop: StopConfig = config.stop
        self.best_by = config.best_by
        self.directions = directions
        self.needs_checkpoints = config.stop.restore or config.best_by is not None
        for key, name in (("stop.metric", self.stop.metric), ("best_by", self.best_by)):
            if name is not None and self._direction(key, name) is None:
                raise UserError(f"{key}={name}: neither a higher nor a lower {name} is better; choose another metric")
        diversity = self.stop.diversity_metric
        if diversity is not None and self._direction("stop.diversity_metric", diversity) is not True:
            raise UserError(f"stop.diversity_metric={diversity}: a floor needs a metric of which higher is better")

    def _direction(self, key: str, name: str) -> bool | None:
        if name not in self.directions:
            raise UserError(f"{key}: no evaluation has the metric {name!r}{did_you_mean(name, self.directions)}")
        return self.directions[name]

    def broken(self, points: pd.DataFrame) -> StopRecord | None:
        """The first rule that the newest evaluation breaks, in the order patience, diversity floor, path KL.

        Args:
            points: a row for each evaluation, see `evaluation.curve.means`; the first is that of the base model.

        Raises:
            UserError: a share of the base model's diversity is asked for, and that is not above 0.
        """
        o = self.stop
        if o.patience is not None and o.metric is not None:
            best = self._best_row(points, o.metric)
            if best is not None and len(points) - 1 - best >= o.patience:
                return self._record("patience", o.metric, points, best, float(points[o.metric].iloc[best]))
        if o.diversity_floor is not None and o.diversity_metric is not None:
            base = float(points[o.diversity_metric].iloc[0])
            if not base > 0:
                raise UserError(f"stop.diversity_floor is a share of the base model's {o.diversity_metric}, which is {base:g}")
            limit = o.diversity_floor * base
            if points[o.diversity_metric].iloc[-1] < limit:
                return self._record("diversity_floor", o.diversity_metric, points, len(points) - 2, limit)
        if o.path_kl is not None and points[PATH_KL].iloc[-1] > o.path_kl:
            return self._record("path_kl", PATH_KL, points, len(points) - 2, o.path_kl)
        return None

    def best(self, points: pd.DataFrame) -> int | None:
        """The iteration with the best value of `best_by` so far; None without it, or before it has a value."""
        row = None if self.best_by is None else self._best_row(points, self.best_by)
        return None if row is None else int(points["iteration"].iloc[row])

    def may_return_to(self, points: pd.DataFrame) -> set[int]:
        """The iterations that a rule would name if a later evaluation broke it."""
        if not self.stop.restore:
            return set()
        rows = {len(points) - 1}
        best = None if self.stop.metric is None else self._best_row(points, self.stop.metric)
        return {int(points["iteration"].iloc[row]) for row in rows | ({best} if best is not None else set())}

    def _best_row(self, points: pd.DataFrame, metric: str) -> int | None:
        """The place of the first evaluation with the best value; None where none has a value."""
        values = points[metric].to_numpy(dtype=np.float64)
        if np.isnan(values).all():
            return None
        return int(np.nanargmax(values if self.directions[metric] else -values))

    def _record(self, rule: str, metric: str, points: pd.DataFrame, named: int, limit: float) -> StopRecord:
        return StopRecord(
            rule=rule,
            iteration=int(points["iteration"].iloc[-1]),
            metric=metric,
            value=float(points[metric].iloc[-1]),
            limit=limit,
            names=int(points["iteration"].iloc[named]),
            restored=self.stop.restore,
        )


PROGRESS, DRAWS = (0.0, 0.5, 1.0), 8
"""Points of the training at which a sampler's plans are compared, and how many plans are drawn at each."""


def check_extension(
    former: RunConfig, config: RunConfig, objective: Objective, sampler: Sampler, policy: Backbone, what: str
) -> None:
    """Raises UserError where a longer run would have been another one from its first iteration on, or nothing is to be added.

    Args:
        former: the configuration that the run had so far.
        config: the same with more iterations.
        objective, sampler, policy: those of the run.
        what: the run, as messages name it.
    """
    if former.iterations is None or former.budget != BudgetConfig():
        raise UserError(
            f"{what} ends by its budget, so that --iterations cannot extend it; start a new run with a larger budget"
        )
    if config.iterations is None or config.iterations <= former.iterations:
        raise UserError(f"{what} has {former.iterations} iterations already; --iterations must be larger to extend it")
    again = f"start a new run with --iterations {config.iterations}"
    if config.optimizer.schedule != "constant":
        raise UserError(
            f"{what} cannot be extended: its learning rate falls over its {former.iterations} iterations "
            f"(optimizer.schedule={config.optimizer.schedule}); {again}"
        )
    plans = [[sampler.plan(progress, np.random.default_rng(draw)) for draw in range(DRAWS)] for progress in PROGRESS]
    following = [f"objective {objective.name} follows"] if objective.follows_progress else []
    following += [f"the plans of sampler {sampler.name} follow"] if any(drawn != plans[0] for drawn in plans) else []
    following += ["its snapshots follow"] if config.snapshots and isinstance(policy, KnownDistributions) else []
    if following:
        raise UserError(
            f"{what} cannot be extended: {following[0]} the progress through its {former.iterations} iterations; {again}"
        )
