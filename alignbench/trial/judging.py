"""From measured differences to the record's numbers, and to the verdict on each metric."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import numpy as np

from alignbench.records.record import Estimate
from alignbench.statistics import Interval
from alignbench.trial.measuring import DEGREES, EXACT, IMAGES, Differences, Key
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
"""The numbers of images and of prompts, and the degree of a collapse, at which blind spots are looked for."""
HALF = 0.5
"""A metric is blind to a loss that it reports less often than this, and fooled by a change that it reports more often."""
LEAST_PROMPTS = 4
"""With fewer prompts of a condition its effect is not known well enough to be a number."""


def seen(differences: Differences, seed: int) -> list[Seen]:
    """Computes how each metric responds to each condition for which enough prompts have a value."""
    found = []
    for metric in differences.metrics:
        for key in differences.of(metric):
            if len(differences.rows(key)) >= LEAST_PROMPTS:
                found.append(_seen(key, differences.kinds[key[1], key[2]], differences.table(key), seed))
    return found


def _seen(key: Key, kind: str, table: np.ndarray, seed: int) -> Seen:
    metric, source, condition, degree, images = key
    size = effect_interval(table)
    if kind == "equal":
        rng = np.random.default_rng([seed, images, *f"{metric} {source} {condition}".encode()])
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
    """Computes how often each metric ranks neighbouring degrees of each planted condition rightly."""
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
    """The effect of the step from one degree to the next, or from the free sets if `before` is empty."""
    both = [row - before[pool] if before else row for pool, row in after.items() if not before or pool in before]
    return effect(np.stack(both)) if both else float("nan")


def verdicts(differences: Differences, found: Sequence[Seen], ranked: Sequence[Ranking]) -> list[Verdict]:
    """Scores each metric, best first; those without an index are last."""
    rates = {metric: Rates(differences, metric) for metric in differences.metrics}
    order = sorted(rates, key=lambda metric: rates[metric].index.value if rates[metric].known else -np.inf, reverse=True)
    best = next((metric for metric in order if metric != EXACT), EXACT)
    return [_verdict(metric, rates[metric], rates[best], found, ranked) for metric in order]


def _verdict(metric: str, rates: "Rates", best: "Rates", found: Sequence[Seen], ranked: Sequence[Ranking]) -> Verdict:
    rightly = [value for r in ranked if r.metric == metric for value in r.rightly.values() if value is not None]
    typical = [s for s in found if s.metric == metric and s.images == TYPICAL_IMAGES and s.degree in (TYPICAL_DEGREE, 0)]
    return Verdict(
        metric=metric,
        youden=Estimate.of(rates.index),
        to_the_best=Estimate.of(rates.interval(rates.indices() - best.indices())),
        power=Estimate.of(rates.interval(rates.mean("planted"))),
        false_alarms=Estimate.of(rates.interval(rates.mean("harmless"))),
        rightly=float(np.mean(rightly)) if rightly else None,
        blind_to=[name(s) for s in typical if s.kind == "planted" and (s.falls[TYPICAL_PROMPTS].value or 0) < HALF],
        fooled_by=[name(s) for s in typical if s.kind == "harmless" and (s.falls[TYPICAL_PROMPTS].value or 0) > HALF],
    )


class Rates:
    """A metric's mean power and its mean rate of false alarms, with all prompts and without each of them.

    Each condition has the same weight, and so has each degree below 1 of it, each number of images, and each number of prompts.
    """

    def __init__(self, differences: Differences, metric: str) -> None:
        self.pools = differences.pools
        conditions: dict[tuple[str, str], list[Key]] = {}
        for key in differences.of(metric):
            if key[3] < 1 and len(differences.rows(key)) >= LEAST_PROMPTS and differences.kinds[key[1], key[2]] != "equal":
                conditions.setdefault((key[1], key[2]), []).append(key)
        self.rates: dict[str, list[np.ndarray]] = {"planted": [], "harmless": []}
        for place, keys in conditions.items():
            effects = np.array([self._effects(place[0], differences.rows(key)) for key in keys])
            rate = power(effects[..., None], np.array(PROMPTS)).mean(axis=(0, 2))
            self.rates[differences.kinds[place]].append(rate)

    def _effects(self, source: str, rows: Mapping[int, np.ndarray]) -> list[float]:
        """The effect with all prompts, then without each one of `pools`."""
        table = np.stack([*rows.values()])
        whole, without = effect(table), dict(zip(rows, effects_without(table), strict=True))
        return [whole, *(without.get(pool, whole) if of == source else whole for of, pool in self.pools)]

    @property
    def known(self) -> bool:
        """Whether there is a planted loss and a harmless change to judge it by."""
        return all(self.rates.values())

    @property
    def index(self) -> Interval:
        """Youden's index."""
        return self.interval(self.indices())

    def mean(self, kind: str) -> np.ndarray:
        """The mean rate over conditions of a kind, with all prompts and without each one; NaN if there are none."""
        return np.mean(self.rates[kind], axis=0) if self.rates[kind] else np.full(len(self.pools) + 1, np.nan)

    def indices(self) -> np.ndarray:
        """Youden's index, with all prompts and without each one."""
        return self.mean("planted") - self.mean("harmless")

    def interval(self, values: np.ndarray) -> Interval:
        """The interval of a statistic, given with all prompts and without each one: a jackknife over prompts of each source."""
        sources = np.array([source for source, _ in self.pools])
        return jackknife(float(values[0]), [values[1:][sources == source] for source in dict.fromkeys(sources)])


def name(found: Seen) -> str:
    """The condition with its source, if that is not the drawing program."""
    return found.condition if found.source == "drawn" else f"{found.condition} ({found.source})"
