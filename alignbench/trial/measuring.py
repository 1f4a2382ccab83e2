"""Measures the sets of a trial: each metric's value of a treated set, minus that of a free set of the same prompt."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import log

import numpy as np

from alignbench.scorer import SetMetric
from alignbench.trial.pools import Pool

DEGREES = (0.25, 0.5, 0.75, 1.0)
"""The planted degrees."""
IMAGES = (4, 8, 16)
"""Numbers of images of a prompt."""
REPETITIONS = 6
"""Pairs of sets that are drawn of each prompt, condition, degree and number of images."""
EXACT = "exact labels"
"""The metric that reads the attributes from the drawing program instead of the image: what a perfect detector would see."""

Measure = Callable[[tuple[int, ...]], dict[str, float]]
"""Maps the indices of a set's images to metric -> value; higher is better."""
Key = tuple[str, str, str, float, int]
"""Metric, source, condition, degree, number of images."""


class Differences:
    """The differences that were measured.

    Attributes:
        tables: key -> the number of a pool to which the condition applies -> float [REPETITIONS], treated minus free set, with
            the sign turned where lower is better. NaN where the metric or the pool has no value.
        kinds: (source, condition) -> its kind.
        pools: (source, number) of each pool.
        of_eval: eval -> its metrics.
    """

    def __init__(self) -> None:
        self.tables: dict[Key, dict[int, np.ndarray]] = {}
        self.kinds: dict[tuple[str, str], str] = {}
        self.pools: list[tuple[str, int]] = []
        self.of_eval: dict[str, list[str]] = {}

    @property
    def metrics(self) -> list[str]:
        """The metrics that had a value at all."""
        return list(dict.fromkeys(key[0] for key in self.tables if self.rows(key)))

    def of(self, metric: str) -> list[Key]:
        """The keys of a metric."""
        return [key for key in self.tables if key[0] == metric]

    def rows(self, key: Key) -> dict[int, np.ndarray]:
        """Returns the rows of a key, for the pools that have all values: pool -> float [REPETITIONS]."""
        return {pool: row for pool, row in self.tables.get(key, {}).items() if not np.isnan(row).any()}

    def table(self, key: Key) -> np.ndarray:
        """The differences of these pools, float [pools, REPETITIONS]."""
        return np.stack([*self.rows(key).values()])

    def add(self, pool: Pool, metrics: Mapping[str, SetMetric], number: int, seed: int) -> None:
        """Measures the sets of one pool with every metric; all see the same sets.

        Args:
            pool: the images of a prompt.
            metrics: the set metrics by name.
            number: the pool's number; it must differ from that of every other pool.
            seed: of the draws.
        """
        self.pools.append((pool.source, number))
        readers = {name: _reader(metric, pool) for name, metric in metrics.items()} | {EXACT: _exact_reader(pool)}
        for condition, treated in pool.conditions.items():
            self.kinds[pool.source, condition] = treated.kind
            for degree in DEGREES if treated.kind == "planted" else (0.0,):
                for n in IMAGES:
                    # The free sets are those of each degree, so degrees can be compared with each other.
                    of_free, of_treated = ((place := [seed, number, n, *condition.encode()]), [*place, int(100 * degree)])
                    pairs = list(_pairs(pool, condition, degree, n, of_free, of_treated))
                    for name, metric, row in _rows(readers, pairs):
                        if metric not in self.of_eval.setdefault(name, []):
                            self.of_eval[name].append(metric)
                        self.tables.setdefault((metric, pool.source, condition, degree, n), {})[number] = row


def _pairs(
    pool: Pool, condition: str, degree: float, n: int, of_free: Sequence[int], of_treated: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """Pairs of a free and a treated set, from a seed of each; None where the pool has too few images."""
    free_rng, treated_rng = np.random.default_rng(of_free), np.random.default_rng(of_treated)
    for _ in range(REPETITIONS):
        free = pool.draw_free(n, free_rng)
        treated = pool.draw_treated(condition, degree, free, treated_rng)
        yield None if treated is None else (free, treated)


def _rows(
    readers: Mapping[str, Measure], pairs: Sequence[tuple[np.ndarray, np.ndarray] | None]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """The eval, the metric and its differences for these pairs of sets."""
    for name, measure in readers.items():
        values: dict[str, list[float]] = {}
        for i, pair in enumerate(pairs):
            if pair is not None:
                free, treated = (measure(tuple(members.tolist())) for members in pair)
                for metric in free:
                    values.setdefault(metric, [np.nan] * len(pairs))[i] = treated[metric] - free[metric]
        yield from ((name, metric, np.array(row)) for metric, row in values.items())


def _reader(metric: SetMetric, pool: Pool) -> Measure:
    """A function that measures the sets of a pool; metrics without a direction are left out."""
    metric.take_reference(pool.prompt, pool.images[pool.reference], pool.latents[pool.reference])
    read = metric.read_images(pool.images, pool.latents, pool.prompt)

    @cache
    def measure(members: tuple[int, ...]) -> dict[str, float]:
        found = metric.measure_read(read, np.array(members), pool.prompt)
        directions = {name: metric.higher_is_better(name) for name in found}
        return {name: value if directions[name] else -value for name, value in found.items() if directions[name] is not None}

    return measure


def _exact_reader(pool: Pool) -> Measure:
    """Like `_reader`, for the exact labels: the mean over attributes of their entropy, divided by its maximum."""
    possible = {attribute: len(set(labels.tolist())) for attribute, labels in pool.labels.items()}

    def measure(members: tuple[int, ...]) -> dict[str, float]:
        entropies = [normalised_entropy(pool.labels[name][list(members)], count) for name, count in possible.items()]
        return {EXACT: float(np.mean(entropies)) if entropies else float("nan")}

    return measure


def normalised_entropy(values: np.ndarray, possible: int) -> float:
    """The entropy of values divided by log min(number of values, number of possible values)."""
    shares = np.array([*Counter(values.tolist()).values()]) / len(values)
    return float(-(shares * np.log(shares)).sum() / log(min(len(values), possible)))
