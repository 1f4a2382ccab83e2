"""From measured differences to the record's numbers, and to the verdict on each metric."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product

import numpy as np

from alignbench.records.record import Estimate
from alignbench.statistics import Interval
from alignbench.trial.measuring import DEGREES, IMAGES, Differences, Key
from alignbench.trial.power import (
    PROMPTS,
    effect,
    effect_interval,
    effects_without,
    false_alarms,
    jackknife,
    power,
    ranked_rightly,
    through,
)
from alignbench.trial.record import Ranking, Seen, Verdict

TYPICAL_IMAGES, TYPICAL_PROMPTS, TYPICAL_DEGREE = 8, 64, 0.5
"""Where blind spots are looked for."""
HALF = 0.5
LEAST_PROMPTS = 4
"""With fewer prompts of a condition its effect is not known well enough to be a number."""


def seen(differences: Differences, rng: np.random.Generator) -> list[Seen]:
    """Says of each metric what it sees of each condition, where enough prompts have a value."""
    found = []
    for metric in differences.metrics:
        for key in differences.of(metric):
            if len(differences.rows(key)) >= LEAST_PROMPTS:
                found.append(_seen(key, differences.kinds[key[1], key[2]], differences.table(key), rng))
    return found


def _seen(key: Key, kind: str, table: np.ndarray, rng: np.random.Generator) -> Seen:
    metric, source, condition, degree, images = key
    size = effect_interval(table)
    if kind == "equal":
        falls, rises = {p: false_alarms(table, p, rng) for p in PROMPTS}, {}
    else:
        opposite = Interval(-size.value, -size.upper, -size.lower, size.n)
        falls, rises = ({p: _power(side, p) for p in PROMPTS} for side in (size, opposite))
    return Seen(
        metric=metric,
        source=source,
        condition=condition,
        kind=kind,
        degree=degree,
        images=images,
        effect=Estimate.of(size),
        falls={p: Estimate.of(interval) for p, interval in falls.items()},
        rises={p: Estimate.of(interval) for p, interval in rises.items()},
    )


def _power(size: Interval, prompts: int) -> Interval:
    return through(lambda effects: power(effects, prompts), size)


def rankings(differences: Differences) -> list[Ranking]:
    """Says of each metric how often it ranks neighbouring degrees of each planted condition rightly."""
    found = []
    planted = [place for place, kind in differences.kinds.items() if kind == "planted"]
    for metric, (source, condition), images in product(differences.metrics, planted, IMAGES):
        of_degree = [differences.rows((metric, source, condition, degree, images)) for degree in DEGREES]
        steps = [_step({}, of_degree[0])] + [_step(*pair) for pair in pairwise(of_degree)]
        known = np.array([step for step in steps if not np.isnan(step)])
        if len(known):
            rightly = {p: float(ranked_rightly(known, p).mean()) for p in PROMPTS}
            found.append(Ranking(metric=metric, source=source, condition=condition, images=images, rightly=rightly))
    return found


def _step(before: Mapping[int, np.ndarray], after: Mapping[int, np.ndarray]) -> float:
    """The effect of the step from one degree to the next; from none, if `before` is empty."""
    both = [row - before[pool] if before else row for pool, row in after.items() if not before or pool in before]
    return effect(np.stack(both)) if both else float("nan")


def verdicts(differences: Differences, found: Sequence[Seen], ranked: Sequence[Ranking]) -> list[Verdict]:
    """Scores each metric, best first."""
    judged = [
        _verdict(differences, metric, [s for s in found if s.metric == metric], [r for r in ranked if r.metric == metric])
        for metric in differences.metrics
    ]
    return sorted(judged, key=lambda v: -np.inf if v.youden.value is None else v.youden.value, reverse=True)


def _verdict(differences: Differences, metric: str, found: Sequence[Seen], ranked: Sequence[Ranking]) -> Verdict:
    rates = Rates(differences, metric)
    rightly = [value for r in ranked for value in r.rightly.values() if value is not None]
    typical = [s for s in found if s.images == TYPICAL_IMAGES and s.degree in (TYPICAL_DEGREE, 0)]
    return Verdict(
        metric=metric,
        youden=Estimate.of(rates.interval(lambda planted, harmless: planted - harmless)),
        power=Estimate.of(rates.interval(lambda planted, harmless: planted)),
        false_alarms=Estimate.of(rates.interval(lambda planted, harmless: harmless)),
        rightly=float(np.mean(rightly)) if rightly else None,
        blind_to=[name(s) for s in typical if s.kind == "planted" and (s.falls[TYPICAL_PROMPTS].value or 0) < HALF],
        fooled_by=[name(s) for s in typical if s.kind == "harmless" and (s.falls[TYPICAL_PROMPTS].value or 0) > HALF],
    )


class Rates:
    """A metric's mean power and its mean rate of false alarms, with all prompts and without each of them.

    Each condition has the same weight, and so has each degree below 1 of it, each number of images, and each number of prompts.
    """

    def __init__(self, differences: Differences, metric: str) -> None:
        self.of_source: dict[str, set[int]] = {}
        conditions: dict[tuple[str, str], list[Key]] = {}
        for key in differences.of(metric):
            rows = differences.rows(key)
            if key[3] < 1 and len(rows) >= LEAST_PROMPTS and differences.kinds[key[1], key[2]] != "equal":
                conditions.setdefault((key[1], key[2]), []).append(key)
                self.of_source.setdefault(key[1], set()).update(rows)
        self.rates: dict[str, list[np.ndarray]] = {"planted": [], "harmless": []}
        self.pools = [(source, pool) for source, pools in self.of_source.items() for pool in sorted(pools)]
        for (source, condition), keys in conditions.items():
            effects = np.array([self._effects(source, differences.rows(key)) for key in keys])
            rate = power(effects[..., None], np.array(PROMPTS)).mean(axis=(0, 2))
            self.rates[differences.kinds[source, condition]].append(rate)

    def _effects(self, source: str, rows: Mapping[int, np.ndarray]) -> list[float]:
        """The effect with all prompts, then without each one of `pools`."""
        table = np.stack([*rows.values()])
        whole, without = effect(table), dict(zip(rows, effects_without(table), strict=True))
        return [whole, *(without.get(pool, whole) if of == source else whole for of, pool in self.pools)]

    def interval(self, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Interval:
        """A statistic of both rates, with the interval of a jackknife over the prompts of each source."""
        if not (self.rates["planted"] and self.rates["harmless"]):
            return Interval(np.nan, np.nan, np.nan, 0)
        whole, *without = statistic(*(np.mean(self.rates[kind], axis=0) for kind in ("planted", "harmless"))).tolist()
        sources = np.array([source for source, _ in self.pools])
        return jackknife(whole, [np.array(without)[sources == source] for source in self.of_source])


def name(found: Seen) -> str:
    """The condition with its source, if that is not the drawing program."""
    return found.condition if found.source == "drawn" else f"{found.condition} ({found.source})"
