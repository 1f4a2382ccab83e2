"""The record of `eval` over a grid of protocols, `protocols.json`."""

from typing import Any, ClassVar

from alignbench.records.base import Document, Number, Record
from alignbench.records.record import Estimate

FILE = "protocols.json"


class GridModel(Record):
    """A model of the grid."""

    method: str
    """Models of one method are its seeds, over which values are averaged."""
    path: str
    """Its run's folder, or the name of its backbone."""


class GridCell(Record):
    """One model by one protocol; its folder `cells/ID` is what `eval` writes."""

    id: str
    model: int
    """Index into `ProtocolGrid.models`."""
    point: int
    """Index into `ProtocolGrid.points`."""
    model_rows_per_image: int
    """Model rows of drawing one image by this protocol."""
    means: dict[str, Number]
    """Metric -> its mean over prompts."""


class FlipRecord(Record):
    """Two methods whose order differs between the first protocol and another one."""

    metric: str
    point: str
    """The other protocol."""
    first: str
    second: str
    before: Estimate
    """First minus second by the first protocol, over prompts."""
    after: Estimate
    """First minus second by the other protocol, over the same prompts."""
    p: Number
    """p of the hypothesis that the order does not flip, by Holm's method for all pairs and protocols of the metric."""
    beyond_chance: bool
    """Whether p is below the level of the test."""

    @property
    def sentence(self) -> str:
        before, after = self.before.value or 0.0, self.after.value or 0.0
        better, worse = (self.first, self.second) if before > 0 else (self.second, self.first)
        return f"{self.metric} of {better} minus that of {worse} is {abs(before):.3g}, but {-abs(after):.3g} at {self.point}"


class Agreement(Record):
    """How well the ranking of methods by one protocol agrees with that by the first one."""

    metric: str
    point: str
    """The other protocol."""
    tau: Estimate
    """Kendall's tau-b with its bootstrap interval over prompts."""


class ProtocolGrid(Document):
    """`protocols.json`: the metrics of several models by several protocols, and whether their ranking survives."""

    KIND: ClassVar[str] = "record of a grid of protocols"

    made: str
    """Time of the evaluation, in UTC."""
    command: str
    """The command that makes the grid again."""
    models: list[GridModel]
    sweep: dict[str, list[Any]]
    """Dotted key of the configuration -> its values."""
    points: list[str]
    """The protocols; the ranking by the first one is what the others are compared with."""
    higher_is_better: dict[str, bool | None]
    """Metric -> whether a higher value is better; null where neither direction is."""
    cells: list[GridCell]
    agreement: list[Agreement]
    """Empty for a single method."""
    flips: list[FlipRecord]
    environment: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of their first models."""
        return list(dict.fromkeys(model.method for model in self.models))

    def mean(self, method: str, point: int, metric: str) -> float:
        """The mean of a metric over the models of a method; NaN where it has none."""
        values = [cell.means.get(metric) for cell in self.cells if cell.point == point and self._is_of(cell, method)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else float("nan")

    def rows_per_image(self, method: str, point: int) -> int:
        """Model evaluations of one image."""
        return next(c.model_rows_per_image for c in self.cells if c.point == point and self._is_of(c, method))

    def _is_of(self, cell: GridCell, method: str) -> bool:
        return self.models[cell.model].method == method
