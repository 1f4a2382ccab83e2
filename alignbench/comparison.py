"""A comparison: the grid of (objective, sampler, task, seed) cells, each trained under one budget and judged alike.

A cell is a run with its own folder. Its configuration is that of `run` for the same names, except that no cell ends by a
number of iterations: all end by the budget, in model rows unless told otherwise. A comparison goes on where it was: cells
with a record are not repeated, an interrupted one resumes from its checkpoint, and names or seeds can be added later.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from alignbench.config import BudgetConfig, RunConfig, load_config, merged_layers, read_yaml, validate
from alignbench.errors import RunError, UserError, did_you_mean
from alignbench.load import load_sampler, threads_of
from alignbench.record import exclusive, read_result, write_atomically
from alignbench.registry import file_name
from alignbench.settings import Settings

SCHEMA_VERSION = 1
SETTINGS, RECORD, RUNS = "comparison.yaml", "comparison.json", "runs"
ENGINES = ("local", "ray")
PROGRESS_POINTS = 25
"""Points of a training at which a sampler's plans are drawn to tell what its rollouts cost on average."""


class Grid(Settings):
    """What is compared: `comparison.yaml`."""

    objectives: list[str] = Field(min_length=1)
    samplers: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    backbone: str
    preset: str
    budget: BudgetConfig
    """Of each cell."""
    threads: int = Field(ge=1)
    """CPU threads of each cell: part of what a result depends on, to the last bit."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Other keys of the configuration, for all cells; below `samplers.NAME` and `objectives.NAME` for those of one name,
    as in a preset."""

    def cells(self) -> list["Cell"]:
        """Seed by seed, so that a comparison that is stopped early has few seeds of everything."""
        product_of = product(self.seeds, self.tasks, self.objectives, self.samplers)
        return [Cell(self, objective, sampler, task, seed) for seed, task, objective, sampler in product_of]


class Cell:
    """One run of the grid.

    Attributes:
        id: the name of its folder.
        config: what it runs with.
    """

    def __init__(self, grid: Grid, objective: str, sampler: str, task: str, seed: int) -> None:
        self.objective, self.sampler, self.task, self.seed = objective, sampler, task, seed
        parts = [file_name(objective), file_name(sampler), file_name(Path(task).stem if "/" in task else task)]
        self.id = "-".join([*parts, f"s{seed}"])
        ends = {"iterations": None, "budget": grid.budget.model_dump(), "threads": grid.threads}
        names = {"backbone": grid.backbone, "task": task, "seed": seed}
        self.config = _configured(grid.preset, grid.settings, objective, sampler, {**names, **ends})


class CellRecord(BaseModel):
    """How a cell stands."""

    model_config = ConfigDict(extra="forbid")

    id: str
    objective: str
    sampler: str
    task: str
    seed: int
    status: Literal["complete", "failed", "pending"]
    error: str | None = None


class ComparisonRecord(BaseModel):
    """`comparison.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    command: str
    grid: Grid
    cells: list[CellRecord]


class Observer(Protocol):
    """Is told how a comparison goes on; see `console.GridProgress`."""

    def began(self, cell: str) -> None: ...
    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None: ...
    def ended(self, record: CellRecord) -> None: ...


def plan_grid(
    *,
    objectives: list[str],
    samplers: list[str],
    tasks: list[str] | None,
    seeds: list[int],
    backbone: str | None,
    preset: str | None,
    budget: Mapping[str, Any],
    settings: Mapping[str, Any],
    workers: int = 1,
) -> Grid:
    """The grid from what a user asked for; all names, settings and plans are checked before anything is loaded.

    Args:
        budget: limits of `BudgetConfig`; without any, all cells get the model rows that the cheapest pair's preset plans.
        settings: further keys of the configuration, from a file and `--set`.

    Raises:
        UserError: a name or a setting is wrong.
    """
    given = dict(settings)
    for key in ("objective", "sampler", "seed"):
        if key in given:
            instead = f"--{key}s" if key == "seed" else f"--{key}s, and settings from {key}s.NAME.{key}.KEY=VALUE"
            raise UserError(f"a comparison takes its {key}s from {instead}; leave out {key}")
    for kind, compared in (("objectives", objectives), ("samplers", samplers)):
        for name in given.get(kind) or {}:
            if name not in compared:
                raise UserError(f"{kind}.{name} has settings but is not compared{did_you_mean(name, compared)}")
    own_budget = given.pop("budget", None) or {}
    if (budget or own_budget) and given.get("iterations") is not None:
        raise UserError("a comparison ends each cell by its budget; leave out iterations")
    named = {} if backbone is None else {"backbone": backbone}
    first = _configured(preset, given, objectives[0], samplers[0], named)
    grid: dict[str, Any] = {
        "objectives": _unique(objectives),
        "samplers": _unique(samplers),
        "tasks": _unique(tasks or [first.task]),
        "seeds": _unique(seeds),
        "backbone": first.backbone.name,
        "preset": first.preset,
        "threads": first.threads or max(1, threads_of(first) // workers),
        "settings": {k: v for k, v in given.items() if k not in ("task", "seed", "preset", "threads", "iterations")},
        "budget": {**own_budget, **budget},
    }
    if not any(grid["budget"].values()):
        pairs = product(grid["objectives"], grid["samplers"])
        grid["budget"] = {"model_rows": min(planned_rows(_configured(first.preset, given, *pair, named)) for pair in pairs)}
    made = validate(Grid, grid, where="comparison")
    check_grid(made)
    return made


def planned_rows(config: RunConfig) -> int:
    """Model rows of a run's iterations, as far as its plans tell: rollouts, and one pass for each update.

    Rows of a reference, of an old policy and of gradient caching come on top.
    """
    if config.iterations is None:
        raise UserError("iterations is null; say what each cell may spend with --budget model_rows=N")
    rollout, replay = rows_per_iteration(config)
    return round(config.iterations * (rollout + config.updates_per_rollout * replay))


def rows_per_iteration(config: RunConfig) -> tuple[float, float]:
    """Rows of a rollout and of one training pass, on average over the training, for samplers that learn as at its start."""
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    groups = config.prompts_per_iteration
    drawn = [
        sampler.plan(i / (PROGRESS_POINTS - 1), np.random.default_rng([config.seed, 1, i])) for i in range(PROGRESS_POINTS)
    ]
    return float(np.mean([p.model_rows(groups) for p in drawn])), float(np.mean([p.replay_rows(groups) for p in drawn]))


def compare(
    grid: Grid,
    out: Path,
    *,
    command: str = "",
    engine: str = "local",
    workers: int = 1,
    gpus: float = 0.0,
    observer: Observer | None = None,
) -> ComparisonRecord:
    """Runs the cells that have no record yet; a failed one does not stop the others.

    Args:
        out: a new folder, or that of an earlier comparison, which goes on.
        workers: local processes; 1 runs the cells in this one.
        gpus: what each cell asks of Ray.

    Raises:
        UserError: there is no such engine; the folder holds something else, or cells with other settings; or another
            process is at work in it.
        KeyboardInterrupt: the cells at work have left a checkpoint; the same call goes on.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}{did_you_mean(engine, ENGINES)}")
    cells = grid.cells()
    check_folder(cells, out)
    with exclusive(out):
        write_atomically(out / SETTINGS, lambda p: p.write_text(_as_yaml(grid), encoding="utf-8"))
        state = _State(grid, cells, out, command, observer)
        waiting = [cell for cell in cells if state.records[cell.id].status == "pending"]
        if engine == "ray":
            _with_ray(waiting, out, state, gpus)
        elif workers == 1:
            _in_this_process(waiting, out, state)
        else:
            _in_processes(waiting, out, state, workers)
        return state.record()


def done(cells: Iterable[Cell], out: Path) -> list[Cell]:
    """Those that have a record."""
    return [cell for cell in cells if _standing(cell, out).status == "complete"]


def read_grid(folder: Path) -> Grid:
    """What the comparison in that folder compares.

    Raises:
        UserError: there is none, or its file has been altered beyond reading.
    """
    file = folder / SETTINGS
    return validate(Grid, read_yaml(file), where=str(file))


def check_folder(cells: Iterable[Cell], out: Path) -> None:
    """Refuses a folder of something else, and cells that were run with other settings: they could not be compared."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / SETTINGS).is_file())):
        raise UserError(f"{out} exists and holds no comparison; choose another --out")
    for cell in cells:
        file = out / RUNS / cell.id / "config.yaml"
        if file.is_file():
            kept, wanted = load_config(file=file).resolved(), cell.config.resolved()
            changed = sorted(k for k in wanted if wanted[k] != kept.get(k))
            if changed:
                differences = ", ".join(f"{k} {kept.get(k)} (now {wanted[k]})" for k in changed)
                raise UserError(f"{file.parent} was run with other settings: {differences}; choose another --out")


def run_cell(
    config: RunConfig, folder: Path, bases: dict[str, Any] | None = None, report: Callable[..., None] = lambda *_: None
) -> str | None:
    """Runs or resumes one cell; returns None, or the sentence that says why it failed."""
    from alignbench.console import Reporting
    from alignbench.training import run

    try:
        run(config, folder, console=Reporting(report), resume=(folder / "config.yaml").exists(), bases=bases)
    except (UserError, RunError) as error:
        return str(error)
    except Exception as error:  # a plug-in's fault must not sink the other cells
        return f"{type(error).__name__}: {error}"
    return None


class PairCost(NamedTuple):
    """What each cell of a pair will cost, as far as it can be told."""

    objective: str
    sampler: str
    rows: float
    """Model rows of one iteration: rollout, and one pass for each update."""
    iterations: float
    seconds: float
    """Of training and judging."""


def estimate(grid: Grid) -> list[PairCost]:
    """Costs from two real iterations of the first pair on this machine, of which the second is timed.

    A pair's seconds follow from its rows and pictures. Objectives that need a reference or an old policy cost more rows
    than are counted here, and so end after fewer iterations; their time is the same.
    """
    first = grid.cells()[0].config
    pace = _pace(first)
    costs = []
    for objective, sampler in product(grid.objectives, grid.samplers):
        config = Cell(grid, objective, sampler, grid.tasks[0], grid.seeds[0]).config
        rollout, replay = rows_per_iteration(config)
        replay *= config.updates_per_rollout
        pictures = config.prompts_per_iteration * _leaves(config)
        seconds = rollout * pace.rollout_row + replay * pace.train_row + pictures * pace.picture
        limits = [
            limit / each
            for limit, each in (
                (grid.budget.model_rows, rollout + replay),
                (grid.budget.reward_calls, pictures * pace.rewards),
                (grid.budget.seconds, seconds),
            )
            if limit is not None
        ]
        judged = config.evaluation.prompts * config.evaluation.images_per_prompt
        judging = judged * ((config.evaluation.steps or pace.steps) * pace.rollout_row + pace.picture)
        costs.append(PairCost(objective, sampler, rollout + replay, min(limits), min(limits) * seconds + judging))
    return costs


class _Pace(NamedTuple):
    rollout_row: float
    train_row: float
    picture: float
    """Decoding and scoring."""
    rewards: int
    steps: int


def _pace(config: RunConfig) -> _Pace:
    from alignbench.evaluation import Judges
    from alignbench.load import load_configured_backbone, load_objective
    from alignbench.tasks import load_task
    from alignbench.trainer import Trainer

    task = load_task(config.task)
    policy, judges = load_configured_backbone(config), Judges(task)
    objective = load_objective(config.objective.name, **config.objective.settings)
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    trainer = Trainer(config, task.train_prompts, policy, objective, sampler, judges)
    trainer.iterate()
    before = trainer.budget.model_copy(deep=True)
    trainer.iterate()
    now = trainer.budget
    seconds = {phase: now.seconds_by_phase[phase] - before.seconds_by_phase[phase] for phase in now.seconds_by_phase}
    return _Pace(
        seconds["rollout"] / max(now.model_rows_rollout - before.model_rows_rollout, 1),
        seconds["train"] / max(now.model_rows_train - before.model_rows_train, 1),
        (seconds["decode"] + seconds["score"]) * len(judges.rewards) / max(now.reward_calls - before.reward_calls, 1),
        len(judges.rewards),
        policy.default_steps,
    )


def _leaves(config: RunConfig) -> int:
    return load_sampler(config.sampler.name, **config.sampler.settings).plan(0.0, np.random.default_rng(0)).leaves


# ---------------------------------------------------------------------------------------------------- engines


class _State:
    """The records of all cells, on disk after each change."""

    def __init__(self, grid: Grid, cells: list[Cell], out: Path, command: str, observer: Observer | None) -> None:
        self.grid, self.out, self.command, self.observer = grid, out, command, observer
        self.records = {cell.id: _standing(cell, out) for cell in cells}
        self._write()

    def record(self) -> ComparisonRecord:
        return ComparisonRecord(command=self.command, grid=self.grid, cells=list(self.records.values()))

    def began(self, cell: Cell) -> None:
        if self.observer:
            self.observer.began(cell.id)

    def ended(self, cell: Cell, error: str | None) -> None:
        status: Literal["complete", "failed"] = "failed" if error else "complete"
        self.records[cell.id] = self.records[cell.id].model_copy(update={"status": status, "error": error})
        self._write()
        if self.observer:
            self.observer.ended(self.records[cell.id])

    def reporter(self, cell: Cell) -> Callable[[Mapping[str, Any], float], None]:
        observer = self.observer
        return lambda row, progress: observer.moved(cell.id, row, progress) if observer else None

    def _write(self) -> None:
        text = self.record().model_dump_json(indent=2) + "\n"
        write_atomically(self.out / RECORD, lambda p: p.write_text(text, encoding="utf-8"))


def _in_this_process(cells: list[Cell], out: Path, state: _State) -> None:
    bases: dict[str, Any] = {}
    for cell in cells:
        state.began(cell)
        state.ended(cell, run_cell(cell.config, out / RUNS / cell.id, bases, state.reporter(cell)))


def _in_processes(cells: list[Cell], out: Path, state: _State, workers: int) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        at_work: dict[Future[str | None], Cell] = {}
        waiting = iter(cells)
        try:
            while True:
                while len(at_work) < workers and (cell := next(waiting, None)) is not None:
                    state.began(cell)
                    at_work[pool.submit(run_cell, cell.config, out / RUNS / cell.id)] = cell
                if not at_work:
                    return
                for done in wait(at_work, return_when=FIRST_COMPLETED).done:
                    cell = at_work.pop(done)
                    state.ended(cell, _outcome(done))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def _outcome(done: "Future[str | None]") -> str | None:
    try:
        return done.result()
    except KeyboardInterrupt:
        raise
    except Exception as error:  # the process died: killed, out of memory
        return f"its process died ({type(error).__name__}: {error})"


def _with_ray(cells: list[Cell], out: Path, state: _State, gpus: float) -> None:
    """Cells as tasks of the cluster at RAY_ADDRESS, or of a local one; `out` must be on a file system that all nodes see."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'alignbench[ray]'") from None
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        task = ray.remote(max_retries=0)(run_cell).options(num_cpus=state.grid.threads, num_gpus=gpus)
        at_work = {task.remote(cell.config, (out / RUNS / cell.id).resolve()): cell for cell in cells}
        while at_work:
            done, _ = ray.wait(list(at_work), num_returns=1)
            cell = at_work.pop(done[0])
            try:
                error = ray.get(done[0])
            except Exception as failure:  # the node or the process died
                error = f"its task died ({type(failure).__name__}: {' '.join(str(failure).split())})"
            state.ended(cell, error)
    finally:
        ray.shutdown()


# ---------------------------------------------------------------------------------------------------- parts


def _standing(cell: Cell, out: Path) -> CellRecord:
    status: Literal["complete", "pending"] = "pending"
    if (out / RUNS / cell.id / "result.json").is_file():
        read_result(out / RUNS / cell.id)  # a record that cannot be read must not count as one
        status = "complete"
    return CellRecord(id=cell.id, objective=cell.objective, sampler=cell.sampler, task=cell.task, seed=cell.seed, status=status)


def check_grid(grid: Grid) -> None:
    """Every pair with its settings, so that a slip shows before hours are spent.

    Raises:
        UserError: a name or a setting is wrong.
    """
    from alignbench.load import load_objective
    from alignbench.tasks import load_task

    for task in grid.tasks:
        load_task(task)
    for objective, sampler in product(grid.objectives, grid.samplers):
        config = Cell(grid, objective, sampler, grid.tasks[0], grid.seeds[0]).config
        load_objective(config.objective.name, **config.objective.settings)
        rows_per_iteration(config)


def _configured(
    preset: str | None, settings: Mapping[str, Any], objective: str, sampler: str, options: Mapping[str, Any]
) -> RunConfig:
    """As `run` is configured, with the settings for all cells, then those of the sampler, then those of the objective."""
    common = {k: v for k, v in settings.items() if k not in ("objectives", "samplers")}
    of_name = [settings.get(kind, {}).get(name) or {} for kind, name in (("samplers", sampler), ("objectives", objective))]
    layers = merged_layers({"objective": objective, "sampler": sampler}, common, *of_name, options)
    return load_config(preset=preset, options=layers)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _as_yaml(grid: Grid) -> str:
    return yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
