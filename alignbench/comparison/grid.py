"""What is compared: the grid of (part, objective, sampler, task, seed), and its file `comparison.yaml`.

An objective or a sampler goes by its name, or by a label under which its settings name it, so that one can be compared with
itself under other settings. A sweep makes a method of each value of a setting. A grid may have named parts: each is the same
grid with some keys changed, and its cells are compared with those of all other parts.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from alignbench.comparison.sweeps import Pair, labels, overlay, points, value_text
from alignbench.comparison.tuned import Tuned, refuse_tuning_seeds
from alignbench.config.run_config import BudgetConfig, RunConfig, load_config, merged_layers, plugin_data, read_settings
from alignbench.errors import UserError
from alignbench.registry import file_name
from alignbench.settings import Settings, validate

SETTINGS = "comparison.yaml"
"""The file of a comparison's folder that says what is compared."""
AXES = ("objective", "sampler", "task", "seed")
OF_REPORT = ("description", "metrics", "kl_levels", "contrasts")
"""Keys of a grid that say what its report shows; parts have none of their own."""
_OF_POINTS = str.maketrans({"(": "-", ",": "-", ")": None})
"""How the label of a sweep's point becomes a part of a folder's name, in which a shell would need quotes for these."""


class Contrast(Settings):
    """A question that is fixed before anything is run: has one method more of a metric than another at equal reward?"""

    first: str
    """The method from which the other is subtracted: its objective, `objective x sampler`, or either behind its part's name, as
    in `matching: tmpo x independent`, as far as is needed to tell it from others."""
    second: str
    """The other method."""
    metric: str | None = None
    """The metric; null takes the measure of diversity that reports use."""
    matters: float = Field(0.1, gt=0)
    """The smallest difference that matters, as a share of the base model's value."""


class Grid(Settings):
    """What is compared, resolved: `comparison.yaml`."""

    objectives: list[str] = Field(min_length=1)
    """Names of objectives, or labels whose settings name one."""
    samplers: list[str] = Field(min_length=1)
    """Names of samplers, or labels whose settings name one."""
    tasks: list[str] = Field(min_length=1)
    """Names of tasks, or absolute paths of their files."""
    seeds: list[int] = Field(min_length=1)
    """Training seeds."""
    backbone: str
    """Name of the backbone, or a local diffusers folder."""
    preset: str
    """The preset that all settings start from."""
    budget: BudgetConfig
    """Where each cell ends."""
    threads: int = Field(ge=1)
    """CPU threads of each cell; a result depends on them to the last bit."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Other keys of the configuration, for all cells; below `samplers.NAME` and `objectives.NAME` for those of one name,
    as in a preset. `objectives.LABEL.objective.name` says what a label stands for: it has the settings of that name too."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Key of a sweep -> its values, each of which makes a method; see `alignbench.comparison.sweeps`."""
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name of a part -> keys of the grid that differ in it; `settings` are merged, other keys replaced. Without parts the grid
    itself is run, with parts these are."""
    description: str = ""
    """One line for the report's title."""
    metrics: list[str] = Field(default_factory=list)
    """The metrics that the report's tables show; all where it is empty."""
    kl_levels: list[float] = Field(default_factory=list)
    """KL divergences to the base model at which the report compares methods; needs `snapshots` in the settings."""
    contrasts: list[Contrast] = Field(default_factory=list)
    """The contrasts that the report answers first; see `alignbench.analysis.planned`."""
    tuned: Tuned | None = None
    """Where `tune` chose the settings; null for settings that it did not choose."""

    def part(self, name: str) -> "Grid":
        """The grid of one part; the grid itself for the name ``."""
        if not name:
            return self
        changed = self.parts[name]
        settings = merged_layers(self.settings, changed.get("settings") or {})
        keys = {**self.model_dump(exclude={"parts", *OF_REPORT}), **changed, "settings": settings}
        return validate(Grid, keys, where=f"part {name!r}")

    def methods(self) -> list["Method"]:
        """Every objective with every sampler at every point of their sweeps, part by part."""
        grids = {name: self.part(name) for name in self.parts or [""]}
        return [
            Method(name, grid, *pair, swept)
            for name, grid in grids.items()
            for pair in product(grid.objectives, grid.samplers)
            for swept in points(grid.sweep, grid.pair(*pair))
        ]

    def pair(self, objective: str, sampler: str) -> Pair:
        """Two compared labels with the names of the plug-ins that they stand for."""
        kinds = (("objective", objective), ("sampler", sampler))
        return Pair(*((label, plugin_name(kind, self.settings.get(f"{kind}s") or {}, label)) for kind, label in kinds))

    def cells(self) -> list["Cell"]:
        """Every run of the grid, seed by seed, so that a comparison that is stopped early has few seeds of everything."""
        methods = self.methods()
        by_seed: dict[int, list[Cell]] = {seed: [] for method in methods for seed in method.grid.seeds}
        for part in self.parts or [""]:
            own = [method for method in methods if method.part == part]
            for seed, task in product(own[0].grid.seeds, own[0].grid.tasks):
                by_seed[seed] += [Cell(method, task, seed) for method in own]
        return [cell for cells in by_seed.values() for cell in cells]


class Method:
    """An objective with a sampler and their settings: what a report has a row for.

    Attributes:
        part: the name of its part; empty in a grid without parts.
        grid: the grid of that part.
        pair: the objective and the sampler as the grid names them.
        objective, sampler: their labels, with the values of sweeps, such as `tmpo(beta=0.5)`.
        swept: the key of each sweep that it is a point of -> the value there.
        base: the objective and the sampler without these values, such as `tmpo x independent`.
    """

    def __init__(self, part: str, grid: Grid, objective: str, sampler: str, swept: Mapping[str, Any] | None = None) -> None:
        self.part, self.grid, self.swept = part, grid, dict(swept or {})
        self.base = f"{objective} x {sampler}"
        self.pair = grid.pair(objective, sampler)
        self.objective, self.sampler = labels(self.swept, self.pair)

    def __str__(self) -> str:
        return f"{self.part}: {self.objective} x {self.sampler}" if self.part else f"{self.objective} x {self.sampler}"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of its cell of the first task and seed; those of its other cells differ in these two alone."""
        grid = self.grid
        ends = {"iterations": None, "budget": grid.budget.model_dump(), "threads": grid.threads}
        first = {"backbone": grid.backbone, "task": grid.tasks[0], "seed": grid.seeds[0]}
        return self.configured({**first, **ends}).anchored()

    def configured(self, options: Mapping[str, Any]) -> RunConfig:
        """Its configuration with some keys that win over all settings but the swept ones."""
        (objective, _), (sampler, _) = self.pair
        shown = (("objective", objective, self.objective), ("sampler", sampler, self.sampler))
        of_point = {kind: {"label": label} for kind, plain, label in shown if label != plain}
        changed = merged_layers(options, overlay(self.swept, self.pair), of_point)
        return configured(self.grid.preset, self.grid.settings, objective, sampler, changed)


def repeated_methods(methods: Iterable[tuple[str, str]]) -> set[str]:
    """Finds the methods that several parts have, which reports name with their part unless it is the first.

    Args:
        methods: objective and sampler without the values of sweeps, as in `Method.base`, with the part.
    """
    parts: dict[str, set[str]] = {}
    for base, part in methods:
        parts.setdefault(base, set()).add(part)
    return {base for base, of_base in parts.items() if len(of_base) > 1}


class Cell:
    """One run of the grid.

    Attributes:
        id: the name of its folder, which begins with the part's name where there are parts.
        method: what it trains with.
    """

    def __init__(self, method: Method, task: str, seed: int) -> None:
        self.method, self.task, self.seed = method, task, seed
        parts = [*filter(None, [method.part]), method.objective, method.sampler, Path(task).stem if "/" in task else task]
        self.id = "-".join([*(file_name(part).translate(_OF_POINTS) for part in parts), f"s{seed}"])

    @property
    def part(self) -> str:
        return self.method.part

    @property
    def objective(self) -> str:
        return self.method.objective

    @property
    def sampler(self) -> str:
        return self.method.sampler

    @property
    def config(self) -> RunConfig:
        """What it runs with."""
        return self.method.config.model_copy(update={"task": self.task, "seed": self.seed})


def former_grid(folder: Path) -> Grid | None:
    """What the comparison in a folder compares; None if there is none."""
    return read_grid(folder) if (folder / SETTINGS).is_file() else None


def read_grid(folder: Path) -> Grid:
    """What the comparison in a folder compares.

    Raises:
        UserError: there is none, or its file has been altered beyond reading.
    """
    file = folder / SETTINGS
    return validate(Grid, read_settings(file, "comparison"), where=str(file))


def with_seeds(grid: Grid, seeds: Sequence[int]) -> Grid:
    """The same comparison with other seeds, such as more of them.

    Raises:
        UserError: a part of the comparison has seeds of its own.
    """
    own = [name for name, part in grid.parts.items() if part.get("seeds")]
    if own:
        raise UserError(f"part {own[0]!r} of the comparison has seeds of its own; change them in its file")
    refuse_tuning_seeds(seeds)
    return validate(Grid, {**grid.model_dump(), "seeds": list(seeds)}, where="comparison")


def configured(
    preset: str | None, settings: Mapping[str, Any], objective: str, sampler: str, options: Mapping[str, Any]
) -> RunConfig:
    """The configuration of a pair: as for `run`, with the settings for all cells, those of the sampler, those of the objective.

    Args:
        settings: as `Grid.settings`.
        objective, sampler: names or labels.
        options: keys that win over all settings.
    """
    common = {k: v for k, v in settings.items() if k not in ("objectives", "samplers")}
    chosen: dict[str, Any] = {}
    of_label = []
    for kind, label in (("sampler", sampler), ("objective", objective)):
        below = settings.get(f"{kind}s") or {}
        name = plugin_name(kind, below, label)
        chosen[kind] = {"name": name} if name == label else {"name": name, "label": label}
        of_label += [below.get(key) or {} for key in dict.fromkeys((name, label))]
    return load_config(preset=preset, options=merged_layers(chosen, common, *of_label, options))


def plugin_name(kind: str, settings: Mapping[str, Any], label: str) -> str:
    """The name that a label stands for: the one in its settings, else the label itself."""
    return str(plugin_data(kind, (settings.get(label) or {}).get(kind)).get("name") or label)


def missing_axis_values(lost: Iterable[Cell], cells: Iterable[Cell]) -> str:
    """What the first cells have that no other cell has, for a message: `objectives tmpo and seeds 3, 4`."""
    lost, cells = list(lost), list(cells)
    texts = []
    for axis in ("part", *AXES, "sweep"):
        present = {value for cell in cells for value in _axis_values(cell, axis)}
        values = dict.fromkeys(value for cell in lost for value in _axis_values(cell, axis) if value not in present)
        if values:
            texts.append(f"{axis}s {', '.join(values)}")
    return " and ".join(texts) or ", ".join(dict.fromkeys(f"{cell.method} by itself" for cell in lost))


def _axis_values(cell: Cell, axis: str) -> list[str]:
    """What a cell is on an axis, as a user names it; a point of several sweeps has several values."""
    match axis:
        case "objective" | "sampler":
            return [getattr(cell.method.pair, axis)[0]]
        case "sweep":
            return [f"{key}={value_text(value)}" for key, value in cell.method.swept.items()]
    return [str(getattr(cell, axis))]


def refuse_study_file(data: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a file of the former command `study`, whose base grid was one level deeper."""
    if "grid" in data:
        raise UserError(
            f"{file} is a study of alignbench 0.1; move the keys of `grid` to the top level, beside `parts`, and use it with "
            "`compare --config`"
        )
