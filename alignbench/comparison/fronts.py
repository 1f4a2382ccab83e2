"""The fronts of a comparison's tasks: made once, kept in its folder, and found again for its runs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alignbench.comparison.grid import Grid
from alignbench.comparison.results import Results
from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError, UserError
from alignbench.frontier import IMAGES
from alignbench.frontier.front import EVALUATION, RECORD, VALIDATION, Front, PromptSet, dependence, read_front
from alignbench.frontier.making import front_of
from alignbench.records.record import Result
from alignbench.tasks import configured_task, load_task

FOLDER = "fronts"
"""Below the folder of a comparison."""


@dataclass
class Fronts:
    """The fronts below a folder.

    Attributes:
        kept: all of them.
        unreadable: a line for each that cannot be read.
    """

    kept: list[Front] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def of(self, result: Result, kind: str = EVALUATION) -> Front | None:
        """The front of a run's task, base model and evaluation; None where there is none."""
        depends_on = dependence(result.config)
        for front in self.kept:
            record = front.record
            same_task = (record.task, record.prompt_set) == (result.run.task, kind)
            if same_task and record.fingerprint == result.task_content and dependence(record.config) == depends_on:
                return front
        return None

    def of_setup(self, results: Results, setup: str, kind: str = EVALUATION) -> Front | None:
        """The front that all runs of a setup have; None where one has none, or another."""
        fronts = [self.of(run.result, kind) for run in results.of(setup)]
        return fronts[0] if all(front is fronts[0] for front in fronts) else None


def read_fronts(folder: Path) -> Fronts:
    """Every front below a folder, at any depth."""
    fronts = Fronts()
    for file in sorted(folder.rglob(RECORD)):
        try:
            front = read_front(file.parent)
            if front is not None:
                fronts.kept.append(front)
        except UserError as error:
            fronts.unreadable.append(str(error))
    return fronts


def make_fronts(
    grid: Grid, out: Path, *, advance: Callable[[str], None] = lambda what: None, warn: Callable[[str], None]
) -> list[Path]:
    """Makes the fronts of a comparison's tasks that its folder does not have yet; returns the folders of the new ones.

    Where runs have curves, there is a second front, for their validation prompts. One that cannot be made does not stop the
    others.

    Args:
        warn: called with the reason why a front cannot be made.
    """
    fronts, made = read_fronts(out), []
    configs = _distinct(cell.config for cell in grid.cells())
    for config in configs:
        if config.scorer_url:
            warn(f"no front of task {config.task}: its reward comes from the scorer at scorer_url, which `front` does not ask")
    for config, kind, images in _planned(configs):
        if _is_there(fronts, config, kind):
            continue
        try:
            front, folder = front_of(config, out / FOLDER, images=images, kind=kind, advance=advance)
        except (UserError, RunError) as error:
            warn(f"no front of task {config.task} for the {kind} prompts: {error}")
        else:
            fronts.kept.append(front)
            made.append(folder)
    return made


def missing_images(grid: Grid, out: Path) -> int:
    """The number of images that `make_fronts` would draw and evaluate."""
    fronts, count = read_fronts(out), 0
    for config, kind, images in _planned(_distinct(cell.config for cell in grid.cells())):
        if not _is_there(fronts, config, kind):
            count += images * len(PromptSet.of(configured_task(config), config.evaluation, kind).prompts)
    return count


def _planned(configs: Iterable[RunConfig]) -> Iterator[tuple[RunConfig, str, int]]:
    """For each front: a configuration, the kind of its prompts and its images of each prompt."""
    for config in configs:
        if config.scorer_url:
            continue
        e = config.evaluation
        yield config, EVALUATION, max(IMAGES, 4 * e.images_per_prompt)
        if _has_curve(config):
            yield config, VALIDATION, max(IMAGES, 4 * e.validation_images)


def _distinct(configs: Iterable[RunConfig]) -> list[RunConfig]:
    """One configuration for each front."""
    found: list[tuple[object, RunConfig]] = []
    for config in configs:
        key = (config.task, config.evals, config.evaluation.every is None, dependence(config.resolved()))
        if key not in [known for known, _ in found]:
            found.append((key, config))
    return [config for _, config in found]


def _has_curve(config: RunConfig) -> bool:
    return config.evaluation.every is not None and bool(load_task(config.task).validation_prompts)


def _is_there(fronts: Fronts, config: RunConfig, kind: str) -> bool:
    task = configured_task(config)
    depends_on, fingerprint = dependence(config.anchored().resolved()), task.fingerprint()
    return any(
        (f.record.task, f.record.prompt_set, dependence(f.record.config), f.record.fingerprint)
        == (task.name, kind, depends_on, fingerprint)
        for f in fronts.kept
    )
