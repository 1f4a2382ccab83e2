"""What a report says of a setup's curves and of its front: everything that is computed once for tables, figures and verdict."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from alignbench.analysis import against_front, curves
from alignbench.analysis.planned import planned_frame
from alignbench.analysis.power import detectable, power_row
from alignbench.analysis.recorded_curves import SetupCurves, method_of, setup_curves
from alignbench.comparison.fronts import Fronts
from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.evaluation.alarm import about_dead_modes, mode_alarms
from alignbench.figures.metric_names import axis_name
from alignbench.frontier.front import REWARD, TILT, VALIDATION, Front, summary
from alignbench.statistics import CONFIDENCE, ONE_SIDED_LEVEL


class NeedlessLosses(NamedTuple):
    """Which methods lost more of a metric of diversity than the tilted target does at the same reward.

    Attributes:
        metric: the metric.
        own: the base model's own loss, 0 or more; a method's counts where its interval is above that.
        lost: the rows of `against_front.avoidable_frame` of methods with such a loss, the largest first.
        unclear: those of methods whose loss may be chance.
        beyond: the cells whose reward the front does not reach.
    """

    metric: str
    own: float
    lost: pd.DataFrame
    unclear: pd.DataFrame
    beyond: list[str]


@dataclass
class CurveReport:
    """The curves and the front of one setup.

    Attributes:
        reward, diversity: the setup's axes.
        recorded: the curves.
        front: of the evaluation prompts; None where there is none.
        curve_front: of the validation prompts, on which curves are measured; likewise.
    """

    results: Results
    setup: str
    reward: str
    diversity: str | None
    recorded: SetupCurves
    front: Front | None = None
    curve_front: Front | None = None
    directions: dict[str, bool | None] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results, setup: str, fronts: Fronts) -> "CurveReport":
        """Reads what a setup's report needs."""
        metrics = results.of(setup)[0].result.metrics
        return cls(
            results,
            setup,
            results.reward(setup),
            results.diversity(setup),
            setup_curves(results, setup),
            fronts.of_setup(results, setup),
            fronts.of_setup(results, setup, VALIDATION),
            {name: record.higher_is_better for name, record in metrics.items()},
        )

    @property
    def reward_name(self) -> str:
        """What sentences call the reward."""
        return axis_name(self.reward)

    @cached_property
    def diversities(self) -> list[str]:
        """Metrics of diversity, the one of the axis first."""
        return against_front.diversity_metrics(self.results, self.setup, self.front)

    @cached_property
    def judges(self) -> list[str]:
        """Metrics that were not trained on, have a direction and are not of diversity; independent scorers first."""
        return against_front.judge_metrics(self.results, self.setup, self.front)

    @property
    def runs(self) -> list[curves.RunCurve]:
        """The curve of each run that has one."""
        return self.recorded.curves

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics that curves have, beside the reward: diversity, then judges, then the KL of the paths."""
        everywhere = set.intersection(*(set(curve.points.columns) for curve in self.runs)) if self.runs else set()
        return [m for m in [*self.diversities, *self.judges, "path_kl"] if m in everywhere and m != self.reward]

    @property
    def comparable(self) -> bool:
        """Whether there are curves with the reward."""
        return bool(self.runs) and all(self.reward in curve.points for curve in self.runs)

    @cached_property
    def common_level(self) -> float | None:
        """The highest reward that all runs reach, or None; see `curves.common_level`."""
        return curves.common_level(self.runs, self.reward) if self.comparable else None

    @cached_property
    def levels(self) -> list[float]:
        """Levels of equal reward, ascending: shares of the best method's gain, the nearest one replaced by what all reach."""
        if not self.comparable:
            return []
        levels, shared = curves.reward_levels(self.runs, self.reward), self.common_level
        if shared is None:
            return levels
        nearest = min(levels, key=lambda level: abs(level - shared))
        return sorted({*(level for level in levels if level != nearest), shared})

    @cached_property
    def at_levels(self) -> pd.DataFrame:
        """Each method's metrics at each level, at the strength that does best on other seeds."""
        table = curves.at_levels(self.runs, self.reward, self.levels, self.metrics)
        swept = len(self.recorded.methods) < len({(c.method, c.strength) for c in self.runs})
        return curves.best_strengths(table, self.directions) if swept else table

    @cached_property
    def differences(self) -> pd.DataFrame:
        """See `curves.equal_reward_differences`; empty without levels or with one method."""
        return curves.equal_reward_differences(self.at_levels) if self.levels else pd.DataFrame()

    @cached_property
    def planned(self) -> pd.DataFrame:
        """The contrasts that the comparison planned; see `planned.planned_frame`."""
        return planned_frame(self.runs, self.results.contrasts, self.reward, self.diversity, self.directions)

    @cached_property
    def rows_to_reward(self) -> list[curves.RowsToReward]:
        """See `curves.rows_to_reward`."""
        return curves.rows_to_reward(self.runs, self.reward, self.levels) if self.levels else []

    @cached_property
    def areas(self) -> pd.DataFrame:
        """A row for each method and metric of diversity: the hypervolume over its evaluations and strengths."""
        rows = []
        for metric in (m for m in self.diversities if self.comparable and m in self.metrics):
            higher = self.directions[metric] is not False
            for method, interval in curves.front_areas(self.runs, self.reward, metric, higher_is_better=higher).items():
                rows.append({"method": method, "metric": metric, **interval._asdict()})
        return pd.DataFrame(rows)

    @cached_property
    def onsets(self) -> pd.DataFrame:
        """See `curves.onset_frame`, for judges and diversity."""
        if not self.comparable:
            return pd.DataFrame()
        directions = {metric: self.directions.get(metric) for metric in [*self.judges, *self.diversities]}
        return curves.onset_frame(self.runs, self.recorded.tables, self.reward, directions)

    @cached_property
    def comparable_front(self) -> Front | None:
        """The front, if models have a place on it: not where training standardised several rewards."""
        return None if self.front is None or self.front.record.normalised else self.front

    @cached_property
    def avoidable(self) -> pd.DataFrame:
        """See `against_front.avoidable_frame`; empty without a front that models can be compared with."""
        front = self.comparable_front
        return (
            pd.DataFrame()
            if front is None
            else against_front.avoidable_frame(self.results, self.setup, front, self.diversities)
        )

    @cached_property
    def needless(self) -> NeedlessLosses | None:
        """The losses of the first metric of diversity that the front has; None without one."""
        frame = self.avoidable
        if frame.empty or (frame["cell"] == BASE).all():
            return None
        metric = str(frame["metric"].iloc[0])
        of_metric = frame[frame["metric"] == metric]
        is_base = of_metric["cell"] == BASE
        rows, base = of_metric[~is_base], of_metric.loc[is_base, "value"].dropna()
        own = max(0.0, float(base.iloc[0])) if len(base) else 0.0
        lost = rows[rows["lower"] > own].sort_values("value", ascending=False)
        unclear = rows[(rows["lower"] <= own) & (rows["lower"] > -np.inf)]
        return NeedlessLosses(metric, own, lost, unclear, rows[rows["value"].isna()]["cell"].astype(str).tolist())

    @cached_property
    def over_optimised(self) -> pd.DataFrame:
        """The rows of `onsets` of judges that get worse in most seeds while the reward rises."""
        frame = self.onsets
        if frame.empty:
            return frame
        return frame[(frame["over_optimised"] * 2 > frame["seeds"]) & frame["metric"].isin(self.judges)]

    @cached_property
    def at_kl(self) -> pd.DataFrame:
        """See `against_front.reward_at_kl_frame`; empty without a front that models can be compared with."""
        front = self.comparable_front
        return pd.DataFrame() if front is None else against_front.reward_at_kl_frame(self.results, self.setup, front)

    @cached_property
    def power(self) -> pd.DataFrame:
        """A row for the reward and each metric of diversity of the trained models: see `power.power_row`."""
        runs = self.results.runs_frame
        rows = []
        for metric in dict.fromkeys([self.reward, *self.diversities]):
            part = runs[(runs["setup"] == self.setup) & (runs["metric"] == metric)]
            values = {str(cell): of_cell.set_index("seed")["final"] for cell, of_cell in part.groupby("cell", sort=False)}
            if len(values) > 1:
                rows.append({"metric": metric, **power_row(values)})
        return pd.DataFrame(rows)

    @cached_property
    def alarms(self) -> dict[tuple[str, int], list[str]]:
        """Cell and seed -> the run's alarms, those about diversity against the front where there is one."""
        return {(run.cell, run.result.run.seed): self._alarms_of(run) for run in self.results.of(self.setup)}

    @cached_property
    def alarm_power(self) -> tuple[int, float] | None:
        """Prompts of a run, and the fall of the axis's diversity that its alarm finds with a power of `POWER`.

        From the spread of the differences over prompts, the median over runs; None where it is not known.
        """
        if self.diversity is None:
            return None
        changes = [run.result.metrics[self.diversity].difference for run in self.results.of(self.setup)]
        known = [(c.n, c.upper - c.lower) for c in changes if c.n > 1 and c.lower is not None and c.upper is not None]
        if not known:
            return None
        prompts = known[0][0]
        error = float(np.median([width for _, width in known])) / 2 / stdtrit(prompts - 1, (1 + CONFIDENCE) / 2)
        return prompts, detectable(error * prompts**0.5, prompts, paired=True, level=2 * ONE_SIDED_LEVEL)

    def _alarms_of(self, run: RecordedRun) -> list[str]:
        found = list(run.result.alarms)
        if self.comparable_front is not None:
            found = against_front.alarms_against(self.results, run, self.comparable_front)
        if run.evals is not None and not any(map(about_dead_modes, run.result.alarms)):
            found += mode_alarms(run.evals)  # records of older versions have none
        return found

    def target_line(self, metric: str) -> list[tuple[float, float]]:
        """Reward and metric along the front of the evaluation prompts, by ascending reward; empty without one."""
        front = self.comparable_front
        if front is None or metric not in front.metrics:
            return []
        means = summary(front)
        means = means[means["rule"] == TILT].pivot(index="strength", columns="metric", values="value")
        return sorted(zip(means[REWARD].astype(float), means[metric].astype(float), strict=True))

    def frames(self) -> dict[str, pd.DataFrame]:
        """Everything as frames, by the names of their files."""
        frames = {
            "planned_contrasts": self.planned,
            "equal_reward": self.at_levels if self.levels else pd.DataFrame(),
            "equal_reward_differences": self.differences,
            "rows_to_reward": pd.DataFrame(self.rows_to_reward),
            "curve_hypervolumes": self.areas,
            "onsets": self.onsets,
            "avoidable_loss": self.avoidable,
            "reward_at_kl": self.at_kl,
            "power": self.power,
        }
        return {name: frame.assign(setup=self.setup) for name, frame in frames.items() if len(frame)}

    @property
    def strengths(self) -> dict[str, list[tuple[str, str]]]:
        """Method -> its strengths in order, each with its cell; methods without a sweep have one, without a name."""
        cells = {method_of(run): run.cell for run in self.results.of(self.setup)}
        order = self.recorded.strengths
        return {method: [(strength, cells[method, strength]) for strength in names] for method, names in order.items()}
