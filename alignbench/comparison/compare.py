"""A comparison: the grid of (objective, sampler, task, seed) cells, each trained under one budget and judged alike.

A cell is a run with its own folder. Its configuration is that of `run` for the same names, except that no cell ends by a
number of iterations: all end by the budget, in model rows unless told otherwise. A comparison goes on where it was: cells
with a record are not repeated, an interrupted one resumes from its checkpoint, and names or seeds can be added later.

An objective or a sampler goes by its name, or by a label under which its settings name it, so that one can be compared with
itself under other settings.
"""

import logging
import os
import shlex
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir, suppress
from itertools import combinations, product
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from alignbench.backbone import device_named
from alignbench.config.run_config import (
    WITHOUT_EFFECT,
    BudgetConfig,
    RunConfig,
    assignments,
    load_config,
    merged_layers,
    placed_keys,
    plugin_data,
    read_settings,
    tasks_path,
)
from alignbench.errors import RunError, UserError, did_you_mean
from alignbench.files.paths import current_folder, placed
from alignbench.files.writing import exclusive, is_free, refuse_links, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.load import load_configured_backbone, load_objective, threads_of
from alignbench.records.record import read_result
from alignbench.registry import file_name, names
from alignbench.runtime import launch
from alignbench.runtime.import_path import HOME, begin_child, safe_children
from alignbench.settings import Settings, validate
from alignbench.tasks import changed_parts, load_task, refuse_changed
from alignbench.training import costs

SCHEMA_VERSION = 1
SETTINGS, RECORD, RUNS = "comparison.yaml", "comparison.json", "runs"
ENGINES = ("local", "ray")


class Grid(Settings):
    """What is compared: `comparison.yaml`."""

    objectives: list[str] = Field(min_length=1)
    """Names, or labels whose settings name one."""
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
    as in a preset. `objectives.LABEL.objective.name` says what a label stands for: it has the settings of that name too."""

    def cells(self) -> list["Cell"]:
        """Seed by seed, so that a comparison that is stopped early has few seeds of everything."""
        product_of = product(self.seeds, self.tasks, self.objectives, self.samplers)
        return [Cell(self, objective, sampler, task, seed) for seed, task, objective, sampler in product_of]


class Cell:
    """One run of the grid.

    Attributes:
        id: the name of its folder.
        objective, sampler: their names, or labels.
        config: what it runs with.
    """

    def __init__(self, grid: Grid, objective: str, sampler: str, task: str, seed: int) -> None:
        self.objective, self.sampler, self.task, self.seed = objective, sampler, task, seed
        parts = [file_name(objective), file_name(sampler), file_name(Path(task).stem if "/" in task else task)]
        self.id = "-".join([*parts, f"s{seed}"])
        ends = {"iterations": None, "budget": grid.budget.model_dump(), "threads": grid.threads}
        names = {"backbone": grid.backbone, "task": task, "seed": seed}
        self.config = _configured(grid.preset, grid.settings, objective, sampler, {**names, **ends}).anchored()


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
    """Is told how a comparison goes on; see `alignbench.cli.console.GridProgress`."""

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
    processes: int = 1,
) -> Grid:
    """The grid from what a user asked for; all names, settings and plans are checked before anything is loaded.

    Args:
        objectives, samplers: names, or `label=name`.
        budget: limits of `BudgetConfig`; without any, all cells get the model rows that the cheapest pair's preset plans.
        settings: further keys of the configuration, from a file and `--set`.
        workers, processes: as for `compare`; they share this machine's threads.

    Raises:
        UserError: a name or a setting is wrong.
    """
    here = current_folder()
    given = placed_keys(placed(settings, None), here)
    for key in ("objective", "sampler", "seed"):
        if key in given:
            instead = f"--{key}s" if key == "seed" else f"--{key}s, and settings from {key}s.NAME.{key}.KEY=VALUE"
            raise UserError(f"a comparison takes its {key}s from {instead}; leave out {key}")
    for kind, items in (("objectives", objectives), ("samplers", samplers)):
        given[kind] = _with_labels(kind, given.get(kind) or {}, items)
    objectives, samplers = ([item.partition("=")[0] for item in items] for items in (objectives, samplers))
    own_budget = given.pop("budget", None) or {}
    if (budget or own_budget) and given.get("iterations") is not None:
        raise UserError("a comparison ends each cell by its budget; leave out iterations")
    named = {} if backbone is None else placed_keys({"backbone": backbone}, here)
    first = _configured(preset, given, objectives[0], samplers[0], named)
    apart = ("task", "seed", "preset", "threads", "iterations")
    grid: dict[str, Any] = {
        "objectives": _unique(objectives),
        "samplers": _unique(samplers),
        "tasks": _unique(tasks_path(task, here) for task in tasks or [first.task]),
        "seeds": _unique(seeds),
        "backbone": first.backbone.name,
        "preset": first.preset,
        "threads": threads_of(first, workers * processes),
        "settings": {k: v for k, v in given.items() if k not in apart and v != {}},
        "budget": {**own_budget, **budget},
    }
    if not any(grid["budget"].values()):
        pairs = product(grid["objectives"], grid["samplers"])
        grid["budget"] = {"model_rows": min(planned_rows(_configured(first.preset, given, *pair, named)) for pair in pairs)}
    made = validate(Grid, grid, where="comparison")
    check_grid(made)
    return made


def command_of(grid: Grid) -> str:
    """The call that makes the comparison anew, ready for a shell."""
    lists = {"objectives": grid.objectives, "samplers": grid.samplers, "tasks": grid.tasks, "seeds": map(str, grid.seeds)}
    words = ["alignbench", "compare"]
    for option, values in lists.items():
        words += [f"--{option}", ",".join(values)]
    words[-1] += "," * (len(grid.seeds) == 1)  # `--seeds 3` would be three of them
    words += ["--backbone", grid.backbone, "--preset", grid.preset]
    for text in assignments(grid.budget.model_dump(exclude_none=True)):
        words += ["--budget", text]
    for text in assignments({"threads": grid.threads, **grid.settings}):
        words += ["--set", text]
    return shlex.join(words)


def planned_rows(config: RunConfig) -> int:
    """Model rows of a run's iterations, as far as its plans tell: rollouts, and one pass for each update.

    Rows of a reference, of an behaviour policy and of gradient caching come on top.
    """
    if config.iterations is None:
        raise UserError("iterations is null; say what each cell may spend with --budget model_rows=N")
    rows = costs.rows_per_iteration(config)
    return round(config.iterations * (rows.rollout + config.updates_per_rollout * rows.asked))


def compare(
    grid: Grid,
    out: Path,
    *,
    command: str | None = None,
    engine: str = "local",
    workers: int = 1,
    processes: int = 1,
    gpus: float = 0.0,
    observer: Observer | None = None,
) -> ComparisonRecord:
    """Runs the cells that have no record yet; a failed one does not stop the others.

    Args:
        out: a new folder, or that of an earlier comparison, which goes on.
        command: what the record says makes this comparison; `command_of(grid)` by default.
        workers: cells at work at a time on this machine; a single one runs in this process.
        processes: that share a cell, each with a GPU of its own where there are any.
        gpus: what each cell asks of Ray.

    Raises:
        UserError: there is no such engine; a cell cannot be shared by so many processes; the folder holds something else, or
            cells with other settings; or another process is at work in it.
        KeyboardInterrupt: the cells at work have left a checkpoint; the same call goes on.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}{did_you_mean(engine, ENGINES)}")
    cells = grid.cells()
    for cell in cells:
        launch.check_share(cell.config.prompts_per_iteration, processes)
    if engine == "local":
        for device in {cell.config.device for cell in cells}:
            device_named(device)
    check_folder(cells, out)
    with exclusive(out):
        write_atomically(out / SETTINGS, lambda p: p.write_text(to_yaml(grid.model_dump(mode="json")), encoding="utf-8"))
        state = _State(grid, cells, out, command or command_of(grid), observer)
        waiting = [cell for cell in cells if state.records[cell.id].status == "pending"]
        if engine == "ray":
            _with_ray(waiting, out, state, gpus, processes)
        elif workers == processes == 1:
            _in_this_process(waiting, out, state)
        else:
            _in_processes(waiting, out, state, workers, processes)
        return state.record()


def done(cells: Iterable[Cell], out: Path) -> list[Cell]:
    """Those that have a record."""
    return [cell for cell in cells if (out / RUNS / cell.id / "result.json").is_file()]


def read_grid(folder: Path) -> Grid:
    """What the comparison in that folder compares.

    Raises:
        UserError: there is none, or its file has been altered beyond reading.
    """
    file = folder / SETTINGS
    return validate(Grid, read_settings(file, "comparison"), where=str(file))


def check_folder(cells: list[Cell], out: Path) -> None:
    """Refuses a folder of something else, one whose finished cells would be left out, and cells that were run with other
    settings: they could not be compared."""
    if not (out / SETTINGS).is_file() and not is_free(out):
        raise UserError(f"{out} exists and holds no comparison; choose another --out")
    refuse_links(out, RUNS)
    if (out / SETTINGS).is_file():
        named = {cell.id for cell in cells}
        lost = [cell for cell in done(read_grid(out).cells(), out) if cell.id not in named]
        if lost:
            listed = ", ".join(cell.id for cell in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise UserError(f"{out} also compares {listed}: name {_unnamed(lost, cells)} too, or choose another --out")
    for cell in cells:
        file = out / RUNS / cell.id / "config.yaml"
        if file.is_file():
            kept, wanted = load_config(file=file).resolved(), cell.config.resolved()
            changed = sorted(k for k in wanted if k not in WITHOUT_EFFECT and wanted[k] != kept.get(k))
            if changed:
                differences = ", ".join(f"{k} {kept.get(k)} (now {wanted[k]})" for k in changed)
                raise UserError(f"{file.parent} was run with other settings: {differences}; choose another --out")
    fingerprints: dict[str, dict[str, str]] = {}
    for cell in done(cells, out):
        folder = out / RUNS / cell.id
        if cell.task not in fingerprints:
            fingerprints[cell.task] = load_task(cell.task).fingerprint()
        refuse_changed(changed_parts(fingerprints[cell.task], read_result(folder).task), str(folder))


def run_cell(
    config: RunConfig,
    folder: Path,
    bases: dict[str, Any] | None = None,
    report: Callable[..., None] = lambda *_: None,
    processes: int = 1,
) -> str | None:
    """Runs or resumes one cell; returns None, or the sentence that says why it failed.

    Args:
        processes: that share it; with more than one, this process can run no other cell afterwards.
    """
    from alignbench.training.progress import Reporting
    from alignbench.training.run import run

    resume = (folder / "config.yaml").exists()
    try:
        refuse_links(folder.parent, folder.name)
        with launch.several(processes, _share_cell, config, folder, resume):
            run(config, folder, console=Reporting(report), resume=resume, bases=bases)
    except (UserError, RunError) as error:
        return str(error)
    except Exception as error:  # a plug-in's fault must not sink the other cells
        return f"{type(error).__name__}: {error}"
    return None


def _share_cell(config: RunConfig, folder: Path, resume: bool) -> None:
    from alignbench.training.run import run

    run(config, folder, resume=resume)


class PairCost(NamedTuple):
    """What each cell of a pair will cost, as far as it can be told."""

    objective: str
    sampler: str
    rows: float
    """Model rows of one iteration."""
    iterations: float
    seconds: float
    """Of training and judging."""


def expected_costs(grid: Grid) -> list[PairCost]:
    """Costs from rows and pictures of the first cell's model that are timed now, on this machine."""
    first = grid.cells()[0].config
    pace = costs.measure_pace(first, load_configured_backbone(first))
    found = []
    for objective, sampler in product(grid.objectives, grid.samplers):
        config = Cell(grid, objective, sampler, grid.tasks[0], grid.seeds[0]).config
        made = load_objective(config.objective.name, **config.objective.settings)
        rows = costs.rows_per_iteration(config, made)
        counted = costs.model_rows(config, rows, made.needs)
        seconds = costs.seconds_per_iteration(config, rows, pace, made.needs, guided=costs.trains_guided(made))
        limits = [
            limit / each
            for limit, each in (
                (grid.budget.model_rows, counted),
                (grid.budget.reward_calls, rows.pictures * pace.rewards),
                (grid.budget.seconds, seconds),
            )
            if limit is not None
        ]
        whole = min(limits) * seconds + costs.seconds_of_judging(config, pace)
        found.append(PairCost(objective, sampler, counted, min(limits), whole))
    return found


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


def _in_processes(cells: list[Cell], out: Path, state: _State, workers: int, processes: int) -> None:
    """A process for each cell, so that one that dies takes no other with it, and each has a peak memory of its own."""
    context = get_context("spawn")
    waiting = iter(cells)
    at_work: dict[Any, tuple[BaseProcess, Cell, list[str | None]]] = {}
    try:
        while True:
            while len(at_work) < workers and (cell := next(waiting, None)) is not None:
                state.began(cell)
                ours, theirs = context.Pipe(duplex=False)
                started = context.Process(target=_cell_process, args=(cell.config, out / RUNS / cell.id, processes, theirs))
                with safe_children():
                    started.start()
                theirs.close()  # so that the end of the process ends the pipe
                at_work[ours] = (started, cell, [])
            if not at_work:
                return
            ready: list[Any] = connection.wait(list(at_work))
            for answer in ready:
                process, cell, outcome = at_work[answer]
                try:
                    message = answer.recv()
                except EOFError:
                    process.join()
                    del at_work[answer]
                    state.ended(cell, outcome[0] if outcome else f"its process died (exit code {process.exitcode})")
                    continue
                if isinstance(message, tuple):
                    state.reporter(cell)(*message)
                else:
                    outcome.append(message)
    except KeyboardInterrupt:
        for process, *_ in at_work.values():
            process.terminate()
        for process, *_ in at_work.values():
            process.join()
        raise


def _cell_process(config: RunConfig, folder: Path, processes: int, answer: Any) -> None:
    """Sends a tuple for each iteration, and in the end what `run_cell` returns; leaves a checkpoint if its parent ends."""
    begin_child()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then sends SIGTERM
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launch.end_with_parent()

    def send(message: Any) -> None:
        with suppress(OSError):  # nobody listens any more
            answer.send(message)

    with suppress(KeyboardInterrupt):
        send(run_cell(config, folder, report=lambda *progress: send(progress), processes=processes))


def _with_ray(cells: list[Cell], out: Path, state: _State, gpus: float, processes: int) -> None:
    """Cells as tasks of the cluster at RAY_ADDRESS, or of a local one that listens to this machine alone.

    `out` must be on a file system that all nodes see.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Ray reads it when it is imported. Its servers then take 127.0.0.1 for their address, and listen nowhere else.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'alignbench[ray]'") from None
    _start_ray(ray)
    try:
        calls = 1 if processes > 1 else 0  # of one process of Ray's; 0 for any number
        remote = ray.remote(max_retries=0, max_calls=calls)(_ray_task)
        task = remote.options(num_cpus=state.grid.threads * processes, num_gpus=gpus)
        place = (os.getcwd(), list(sys.path))
        at_work = {task.remote(place, cell.config, (out / RUNS / cell.id).resolve(), processes): cell for cell in cells}
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


def _start_ray(ray: Any) -> None:
    """Connects to the cluster at RAY_ADDRESS, or starts one on this machine; raises RunError where that fails."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _check_reachable(address)
        with chdir(HOME):  # Ray puts the folder that it is started from on its workers' import path
            ray.init(
                address or "local",
                ignore_reinit_error=True,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray has many kinds
        with suppress(Exception):
            ray.shutdown()
        what = f"be reached at RAY_ADDRESS={address}" if address else "be started on this machine"
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"Ray cannot {what}: {why}; nothing has been run, and --engine local works without it") from None


def _check_reachable(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`, which Ray would take minutes to find out."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _ray_task(place: tuple[str, list[str]], config: RunConfig, folder: Path, processes: int) -> str | None:
    """`run_cell` in the folder and with the import path of the process that asks for it."""
    here, path = place
    with suppress(OSError):  # on other machines it may not exist
        os.chdir(here)
    sys.path += [entry for entry in path if entry not in sys.path]
    return run_cell(config, folder, processes=processes)


# ---------------------------------------------------------------------------------------------------- parts


def _standing(cell: Cell, out: Path) -> CellRecord:
    status: Literal["complete", "pending"] = "pending"
    if (out / RUNS / cell.id / "result.json").is_file():
        read_result(out / RUNS / cell.id)  # a record that cannot be read must not count as one
        status = "complete"
    return CellRecord(id=cell.id, objective=cell.objective, sampler=cell.sampler, task=cell.task, seed=cell.seed, status=status)


def _with_labels(kind: str, settings: Any, items: list[str]) -> dict[str, Any]:
    """The settings below `objectives` or `samplers`, with what the labels of `label=name` stand for.

    Raises:
        UserError: something has settings that is not compared, or a label would be taken for something else.
    """
    one = kind.removesuffix("s")
    named: dict[str, str] = {}
    for item in items:
        label, equals, name = item.partition("=")
        if not label or (equals and not name):
            raise UserError(f"--{kind} takes names, or label=name, with commas; got {item!r}")
        if named.setdefault(label, name) != name:
            raise UserError(f"--{kind} has {label} twice; choose another label for one of them")
    if not isinstance(settings, Mapping) or not all(below is None or isinstance(below, Mapping) for below in settings.values()):
        raise UserError(f"{kind} holds settings by name, such as {kind}.{items[0]}.optimizer.lr, got {settings!r}")
    found = merged_layers(settings, {label: {one: {"name": name}} for label, name in named.items() if name})
    stands_for = {label: _plugin(one, found, label) for label in named}
    for label in found:
        if label not in stands_for and label not in stands_for.values():
            raise UserError(f"{kind}.{label} has settings but is not compared{did_you_mean(label, named)}")
    for label, name in stands_for.items():
        if name != label and label in names(kind):
            raise UserError(f"{kind}.{label} names {name}, but there is {label} itself; choose another label")
    return found


def check_grid(grid: Grid) -> None:
    """Every pair with its settings, so that a slip shows before hours are spent.

    Raises:
        UserError: a name or a setting is wrong.
    """
    from alignbench.training.tracking import check_trackers

    for task in grid.tasks:
        load_task(task)
    cells = [Cell(grid, *pair, grid.tasks[0], grid.seeds[0]) for pair in product(grid.objectives, grid.samplers)]
    for cell in cells:
        load_objective(cell.config.objective.name, **cell.config.objective.settings)
        costs.rows_per_iteration(cell.config)
        check_trackers(cell.config.trackers)
    for one, other in combinations(cells, 2):
        if _unlabelled(one.config) == _unlabelled(other.config):
            kind = "objective" if one.objective != other.objective else "sampler"
            label = getattr(other, kind)
            raise UserError(
                f"{one.objective} x {one.sampler} and {other.objective} x {other.sampler} differ in nothing but their label; "
                f"say how with --set {kind}s.{label}.{kind}.KEY=VALUE"
            )
    counted = Counter(cell.id for cell in grid.cells())
    for twice in (id for id, count in counted.items() if count > 1):
        raise UserError(f"two cells would share the folder {twice}; give one of their tasks or plug-ins another name")


def _unlabelled(config: RunConfig) -> dict[str, Any]:
    return {k: {**v, "label": None} if k in ("objective", "sampler") else v for k, v in config.resolved().items()}


def _configured(
    preset: str | None, settings: Mapping[str, Any], objective: str, sampler: str, options: Mapping[str, Any]
) -> RunConfig:
    """As `run` is configured, with the settings for all cells, then those of the sampler, then those of the objective."""
    common = {k: v for k, v in settings.items() if k not in ("objectives", "samplers")}
    chosen: dict[str, Any] = {}
    of_label = []
    for kind, label in (("sampler", sampler), ("objective", objective)):
        below = settings.get(f"{kind}s") or {}
        name = _plugin(kind, below, label)
        chosen[kind] = {"name": name} if name == label else {"name": name, "label": label}
        of_label += [below.get(key) or {} for key in dict.fromkeys((name, label))]
    return load_config(preset=preset, options=merged_layers(chosen, common, *of_label, options))


def _plugin(kind: str, settings: Mapping[str, Any], label: str) -> str:
    """The name that a label stands for: the one in its settings, else itself."""
    return str(plugin_data(kind, (settings.get(label) or {}).get(kind)).get("name") or label)


def _unnamed(lost: list[Cell], cells: list[Cell]) -> str:
    """What the cells that would be left out have that no other has: `objectives tmpo and seeds 3, 4`."""
    found = []
    for axis in ("objective", "sampler", "task", "seed"):
        named = {getattr(cell, axis) for cell in cells}
        values = _unique(str(value) for cell in lost if (value := getattr(cell, axis)) not in named)
        if values:
            found.append(f"{axis}s {', '.join(values)}")
    return " and ".join(found)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
