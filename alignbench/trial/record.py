"""The record of a trial, `trial.json`. Intervals are at 95 % over prompts, unless the text says otherwise."""

from typing import ClassVar

from alignbench.records.base import Document, Record
from alignbench.records.record import Estimate


class Seen(Record):
    """How a metric responds to a condition at one degree, with one number of images of each prompt."""

    metric: str
    """Name of the metric."""
    source: str
    """`drawn` for images by the drawing program, `own` for those of the embedded model."""
    condition: str
    """What was done to the images."""
    kind: str
    """`planted` (a loss of diversity), `harmless` (blur, noise or contrast), or `equal` (no change)."""
    degree: float
    """The share of collapsed images, 0 for conditions that are not planted."""
    images: int
    """Number of images of a prompt in each set."""
    effect: Estimate
    """The mean difference to a free set, divided by its standard deviation: below 0 for a fall."""
    falls: dict[int, Estimate]
    """Number of prompts -> the probability that the alarm's test reports a fall. For equal sets it is simulated."""
    rises: dict[int, Estimate]
    """Number of prompts -> the probability that it reports a rise; empty for equal sets."""


class Ranking(Record):
    """How often a metric ranks two neighbouring degrees of a condition rightly: the mean over neighbours."""

    metric: str
    """As in `Seen`, like the next three."""
    source: str
    condition: str
    images: int
    rightly: dict[int, float | None]
    """Number of prompts -> the probability."""


class Verdict(Record):
    """A metric's score: Youden's index, its mean power over all planted losses minus its mean rate of false alarms."""

    metric: str
    youden: Estimate
    to_the_best: Estimate
    """The index minus that of the best metric that reads images, paired by prompt."""
    power: Estimate
    """The mean over conditions, degrees below 1, numbers of images and numbers of prompts."""
    false_alarms: Estimate
    """The mean over harmless changes, numbers of images and numbers of prompts."""
    rightly: float | None
    """The mean probability of ranking two neighbouring degrees rightly."""
    blind_to: list[str]
    """Planted conditions of which it sees a collapse by half with 8 images of 64 prompts less often than every second time."""
    fooled_by: list[str]
    """Harmless changes that it then reports as a fall more often than every second time."""


class Trial(Document):
    """What `check --eval` found about metrics."""

    KIND: ClassVar[str] = "trial"

    evals: dict[str, dict[str, object]]
    """Eval -> its settings."""
    seed: int
    """Seed of all draws."""
    drawn_prompts: int
    """Number of prompts with images by the drawing program."""
    own_prompts: int
    """Number of prompts with images of the embedded model; 0 where none were drawn."""
    seconds: float
    """Wall-clock time of the trial."""
    metrics: dict[str, list[str]]
    """Eval -> its metrics; `exact labels` reads the attributes from the drawing program."""
    verdicts: list[Verdict]
    """Best first; metrics without an index are last."""
    rankings: list[Ranking]
    seen: list[Seen]
