"""How often 95 % intervals hold the true mean: the table of docs/reading-a-report.md, simulated again."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from alignbench.statistics import interval_over_runs, mean_interval, mean_of_means_interval

PAGE = Path(__file__).parents[2] / "docs" / "reading-a-report.md"
SAMPLES = 2000
SIZES = (6, 12, 48)
Law = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def ocr(rng: np.random.Generator, shape: tuple[int, ...], wrong: float) -> np.ndarray:
    """1 - distance / length of words of three to five letters, each letter of which is wrong with that probability."""
    length = rng.integers(3, 6, shape)
    return np.asarray(1 - rng.binomial(length, wrong) / length)


def changes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of 60 % of the prompts none; of the others mostly for the better."""
    moved = rng.choice([0.25, 0.5, 1.0, -0.25], p=[0.4, 0.3, 0.2, 0.1], size=shape)
    return np.asarray(np.where(rng.random(shape) < 0.6, 0.0, moved))


DISTRIBUTIONS: dict[str, tuple[Law, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "OCR, a quarter of the letters wrong": (lambda rng, shape: ocr(rng, shape, 0.25), 0.75),
    "OCR, a twentieth wrong": (lambda rng, shape: ocr(rng, shape, 0.05), 0.95),
    "the same, means of four images": (lambda rng, shape: ocr(rng, (*shape, 4), 0.05).mean(-1), 0.95),
    "changes, most of them 0": (changes, 0.4 * (0.1 + 0.15 + 0.2 - 0.025)),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
}


def by_percentiles(values: np.ndarray, rng: np.random.Generator, resamples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap, of each row; the same resamples for all rows."""
    n = values.shape[1]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    low, high = np.quantile(values @ weights.T, [0.025, 0.975], axis=1)
    return low, high


@cache
def simulated(name: str, n: int) -> tuple[float, float, float]:
    """Share of the samples whose interval holds the mean, share of those without an interval, and that of the bootstrap."""
    (distribution, mean), rng = DISTRIBUTIONS[name], np.random.default_rng(n)
    values = distribution(rng, (SAMPLES, n))
    found = np.array([mean_interval(row) for row in values])
    holds = (found[:, 1] <= mean + 1e-9) & (mean - 1e-9 <= found[:, 2])
    low, high = by_percentiles(values, rng)
    of_bootstrap = ((low <= mean + 1e-9) & (mean - 1e-9 <= high)).mean()
    return float(holds.mean()), float(np.isinf(found[:, 1]).mean()), float(of_bootstrap)


def row(name: str) -> str:
    """A line of the page's table."""
    columns = zip(*(simulated(name, n) for n in SIZES), strict=True)
    return f"| {name} | {' | '.join(f'{value:.2f}' for column in columns for value in column)} |"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_pages_table_of_coverage_is_what_a_simulation_gives(name: str) -> None:
    (line,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    said, found = ([float(cell) for cell in text.split("|")[2:-1]] for text in (line, row(name)))
    assert said == pytest.approx(found, abs=0.011)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name.startswith(("normal", "OCR", "the same"))])
def test_intervals_of_scores_hold_their_mean_about_as_often_as_they_say(name: str) -> None:
    few, more, many = (simulated(name, n)[0] for n in SIZES)
    # A share of 2,000 has a deviation of 0.005; the skew of scores near 1 costs up to four hundredths at six prompts.
    assert few > 0.90
    assert min(more, many) > 0.92


@pytest.mark.parametrize("prompts", [4, 8])
def test_means_over_task_types_do_too(prompts: int) -> None:
    """Six types as GenEval's, right or wrong, of which some are nearly always right."""
    rng, rates = np.random.default_rng(0), (0.98, 0.9, 0.75, 0.7, 0.4, 0.3)
    found = [mean_of_means_interval([rng.binomial(4, p, prompts) / 4 for p in rates]) for _ in range(SAMPLES)]
    assert np.mean([i.lower <= np.mean(rates) <= i.upper for i in found]) > 0.95 - 0.02


@pytest.mark.parametrize("seeds", [3, 5])
def test_interquartile_means_over_a_few_seeds_do_too(seeds: int) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(0.0, 0.05, (seeds, 1)) + rng.normal(0.0, 0.2, (seeds, 24)) for _ in range(500)]
    found = [interval_over_runs(table) for table in scores]  # symmetric around 0, and so is its interquartile mean
    assert np.mean([i.lower <= 0 <= i.upper for i in found]) > 0.95 - 0.03


if __name__ == "__main__":
    print(*map(row, DISTRIBUTIONS), sep="\n")
