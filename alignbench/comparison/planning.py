"""From what a user asks for to a grid whose names, settings and plans have been checked, before anything is loaded."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

from alignbench.comparison.grid import (
    OF_REPORT,
    SETTINGS,
    Contrast,
    Grid,
    Method,
    configured,
    plugin_name,
    refuse_study_file,
    repeated_methods,
)
from alignbench.comparison.sweep_requests import flattened, naming_the_point, refuse_ineffective, resolved, texts
from alignbench.comparison.sweeps import Pair
from alignbench.comparison.tuned import Tuned, refuse_elsewhere, refuse_tuning_seeds
from alignbench.config.run_config import (
    RunConfig,
    assignments,
    merged_layers,
    placed_keys,
    plugin_data,
    read_settings,
    tasks_path,
)
from alignbench.errors import UserError, did_you_mean
from alignbench.files.paths import current_folder, placed
from alignbench.files.writing import is_file_name
from alignbench.forecast import expected_rows
from alignbench.load import load_configured_objective, threads_of
from alignbench.registry import names
from alignbench.settings import Settings, validate
from alignbench.tasks import trained_task

_OF_RUN = ("seed", "task", "preset", "threads", "budget", "iterations", "backbone")
"""Keys of a run's configuration that a comparison has elsewhere than among its settings."""
SEEDS = (0, 1, 2)
"""The seeds of a comparison whose user asks for none."""


class PartRequest(Settings):
    """The keys of a grid as a file or the command line gives them; null where they say nothing."""

    objectives: list[str] | None = None
    """Names, or `label=name`."""
    samplers: list[str] | None = None
    """Names, or `label=name`."""
    tasks: list[str] | None = None
    """Names of tasks."""
    seeds: list[int] | None = None
    """Seeds of each pair."""
    backbone: str | None = None
    """Name of the backbone."""
    preset: str | None = None
    """Name of the preset."""
    budget: dict[str, Any] | None = None
    """Limits of `BudgetConfig`."""
    threads: int | None = None
    """CPU threads of each run."""
    sweep: dict[str, Any] | None = None
    """Key of a sweep -> its values, or null after an objective's name alone; see `alignbench.comparison.sweeps`."""
    settings: dict[str, Any] | None = None
    """As `Grid.settings`."""


class Request(PartRequest):
    """What a user asks to compare: a comparison file, with what the command line adds."""

    parts: dict[str, dict[str, Any]] | None = None
    """Name -> keys of `PartRequest`."""
    description: str | None = None
    """As `Grid.description`."""
    metrics: list[str] | None = None
    """As `Grid.metrics`."""
    kl_levels: list[float] | None = None
    """As `Grid.kl_levels`."""
    contrasts: list[Contrast] | None = None
    """As `Grid.contrasts`."""
    tuned: Tuned | None = None
    """As `Grid.tuned`."""

    def with_options(self, **options: Any) -> "Request":
        """The same with those options that are not None in place of its own; `settings` are merged."""
        chosen = {key: value for key, value in options.items() if value is not None}
        if "settings" in chosen:
            chosen["settings"] = merged_layers(self.settings or {}, chosen["settings"])
        return validate(Request, {**self.model_dump(exclude_none=True), **chosen}, where="comparison")

    def continuing(self, former: Grid | None) -> "Request":
        """The same with the budget of the comparison that it continues, unless it has one."""
        if former is None or self.budget or (self.settings or {}).get("budget"):
            return self
        return self.with_options(budget=former.budget.model_dump(exclude_none=True))


def read_request(file: Path) -> Request:
    """The request in a comparison file, or in a file with keys of the configuration alone, shaped like a preset.

    A file is a comparison file if it lists objectives or samplers, or has `parts`, `tasks`, `seeds`, `settings` or `sweep`. The
    configuration of a run, which has an objective and a sampler with their settings, asks for this pair and may be widened.

    Raises:
        UserError: the file cannot be read, or one of its keys is wrong.
    """
    data = read_settings(file)
    refuse_study_file(data, file)
    lists = [key for key in ("objectives", "samplers") if isinstance(data.get(key), list)]
    if lists or {"parts", "tasks", "seeds", "settings", "sweep"} & set(data):
        return validate(Request, data, where=str(file))
    is_of_run = all(isinstance(data.get(kind), Mapping) and data[kind].get("name") for kind in ("objective", "sampler"))
    return validate(Request, _of_run(data), where=str(file)) if is_of_run else Request(settings=data)


def _of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The request that the configuration of a run makes: its pair with its settings, on its task and within its budget."""
    settings = {key: value for key, value in config.items() if key not in {*_OF_RUN, "objective", "sampler"}}
    asked: dict[str, Any] = {}
    for kind in ("objective", "sampler"):
        plugin = plugin_data(kind, config[kind])
        name, label = plugin.pop("name"), plugin.pop("label", None)
        asked[f"{kind}s"] = [name if label is None else f"{label}={name}"]
        if plugin:
            settings[f"{kind}s"] = {label or name: {kind: plugin}}
    limits = {key: value for key, value in (config.get("budget") or {}).items() if value is not None}
    backbone = plugin_data("backbone", config.get("backbone"))
    if len(backbone) > 1:
        settings["backbone"] = backbone
    asked |= {"tasks": [config["task"]]} if "task" in config else {}
    asked |= {"backbone": backbone["name"]} if backbone.get("name") else {}
    asked |= {"preset": config["preset"]} if "preset" in config else {}
    asked |= {"threads": config["threads"]} if config.get("threads") else {}
    if limits:
        asked["budget"] = limits
    elif config.get("iterations") is not None:
        settings["iterations"] = config["iterations"]
    return {**asked, "settings": settings}


def plan_grid(request: Request, at_once: int = 1) -> Grid:
    """The grid of a request; all names, settings and plans are checked before anything is loaded.

    Without a budget, all cells get the model rows that the preset plans for the cheapest method.

    Args:
        at_once: processes that share this machine's threads.

    Raises:
        UserError: a name or a setting is wrong.
    """
    here = current_folder()
    base = _resolved_keys(request, here)
    requests = {name: validate(PartRequest, part, where=f"part {name!r}") for name, part in (request.parts or {}).items()}
    parts = {name: _resolved_keys(part, here) for name, part in requests.items()}
    for name in parts:
        if not is_file_name(name) or ":" in name:
            raise UserError(f"a part's name begins the names of its folders, which {name!r} cannot; choose another name")
    for axis in ("objectives", "samplers"):
        union = _unique(value for part in parts.values() for value in part.get(axis, []))
        base.setdefault(axis, union)
        if not base[axis]:
            raise UserError(f"a comparison needs {axis}: name them with --{axis}, or in its file")
    _check_labels(base, parts)
    _resolve_sweeps(base, parts)
    named = {"backbone": base["backbone"]} if "backbone" in base else {}
    first = configured(base.get("preset"), base["settings"], base["objectives"][0], base["samplers"][0], named)
    iterations = base["settings"].pop("iterations", None)
    keys = {
        "tasks": [first.task],
        "seeds": list(SEEDS),
        "threads": threads_of(first, at_once),
        "budget": {},
        **base,
        "backbone": first.backbone.name,
        "preset": first.preset,
        "parts": parts,
        **{key: getattr(request, key) for key in (*OF_REPORT, "tuned") if getattr(request, key)},
    }
    if any(keys["budget"].values()):
        if iterations is not None:
            raise UserError("a comparison ends each cell by its budget; leave out iterations")
    else:
        keys["budget"] = {"model_rows": _cheapest(keys, named, iterations)}
    grid = validate(Grid, keys, where="comparison")
    if grid.contrasts:
        spellings = _spellings(grid)
        grid = grid.model_copy(update={"contrasts": [_named(contrast, spellings) for contrast in grid.contrasts]})
    refuse_tuning_seeds(cell.seed for cell in grid.cells())
    if grid.tuned is not None:
        parts_of_grid = [grid.part(name) for name in grid.parts or [""]]
        refuse_elsewhere(grid.tuned, [(part.tasks, part.backbone) for part in parts_of_grid])
    check_grid(grid)
    return grid


def _spellings(grid: Grid) -> dict[str, list[str]]:
    """What a user may call a method -> the names of such methods in reports."""
    first_part, methods = next(iter(grid.parts), ""), grid.methods()
    repeated = repeated_methods((method.base, method.part) for method in methods)
    known: dict[str, list[str]] = {}
    for method in methods:
        needs_part = method.part != first_part and method.base in repeated
        name = f"{method.part}: {method.base}" if needs_part else method.base
        labels = (method.base.partition(" x ")[0], method.base)
        for spelt in dict.fromkeys((*labels, *(f"{method.part}: {label}" for label in labels), name)):
            if name not in known.setdefault(spelt, []):
                known[spelt].append(name)
    return known


def _named(contrast: Contrast, known: Mapping[str, list[str]]) -> Contrast:
    """The contrast with the names that reports give its methods.

    Args:
        known: from `_spellings`.

    Raises:
        UserError: a name is no method's, or that of several, or both are the same one's.
    """
    names = {}
    for end in ("first", "second"):
        spelt = getattr(contrast, end)
        found = [spelt] if spelt in known.get(spelt, []) else known.get(spelt, [])  # a report's own name is meant exactly
        if not found:
            raise UserError(f"contrasts: nothing that is compared is called {spelt!r}{did_you_mean(spelt, known)}")
        if len(found) > 1:
            raise UserError(f"contrasts: {spelt!r} may be {' or '.join(map(repr, found))}; name one of them")
        names[end] = found[0]
    if names["first"] == names["second"]:
        raise UserError(f"contrasts: {contrast.first!r} and {contrast.second!r} are one method; name two")
    return contrast.model_copy(update=names)


def check_grid(grid: Grid) -> None:
    """Checks every method with its settings, so that a mistake shows before hours are spent.

    Raises:
        UserError: a name or a setting is wrong.
    """
    from alignbench.training.tracking import check_trackers

    methods = grid.methods()
    rewards: dict[Any, int] = {}
    for method in methods:
        with naming_the_point(method):
            config = method.config
            objective = load_configured_objective(config)
            rows = expected_rows.rows_per_iteration(config, objective)
            check_trackers(config.trackers)
        refuse_ineffective(method, objective)
        for task in method.grid.tasks:
            if (key := (task, tuple(config.reward.items()), config.scorer_url)) not in rewards:
                with naming_the_point(method):
                    rewards[key] = len(trained_task(config.model_copy(update={"task": task})).config.reward)
            if objective.needs.training and not config.pairs:
                _check_budget(method, rows, rewards[key])
    _refuse_equal_methods(methods)
    counted = Counter(cell.id for cell in grid.cells())
    for twice in (id for id, count in counted.items() if count > 1):
        raise UserError(f"two cells would share the folder {twice}; give one of their tasks or plug-ins another name")


def command_of(grid: Grid, folder: Path | None = None) -> str:
    """The command that makes the comparison again, ready for a shell.

    Args:
        folder: the comparison's folder. Its `comparison.yaml` is what the command of a grid with parts reads, since options
            cannot say them.
    """
    if grid.parts or grid.tuned or any(getattr(grid, key) for key in OF_REPORT):
        return shlex.join(["alignbench", "compare", "--config", str((folder or Path()) / SETTINGS)])
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
    for text in texts(grid.sweep):
        words += ["--sweep", text]
    return shlex.join(words)


def _check_budget(method: Method, rows: expected_rows.ExpectedRows, rewards: int) -> None:
    """Raises UserError where a method's first iteration alone takes more than the budget, which would not end it in time."""
    budget, config = method.grid.budget, method.config
    needed = rows.rollout + config.updates_per_rollout * rows.asked
    for limit, name, least in (
        (budget.model_rows, "model_rows", needed),
        (budget.reward_calls, "reward_calls", rows.images * rewards),
    ):
        if limit is not None and limit < least:
            raise UserError(
                f"budget {name}={limit} is too small for one iteration of {method}, which takes {least:,.0f}; raise it, or "
                "lower prompts_per_iteration"
            )


def planned_rows(config: RunConfig) -> int:
    """Model rows of a run's iterations, as far as its plans say: rollouts, and one pass for each update.

    Rows of a reference, of a behaviour policy and of gradient caching come on top.

    Raises:
        UserError: the number of iterations is not known (null).
    """
    if config.iterations is None:
        raise UserError("iterations is null; say where each cell ends with --budget model_rows=N")
    rows = expected_rows.rows_per_iteration(config)
    return round(config.iterations * (rows.rollout + config.updates_per_rollout * rows.asked))


def _cheapest(keys: Mapping[str, Any], named: Mapping[str, Any], iterations: int | None) -> int:
    """The fewest model rows that any method's iterations are planned to take."""
    grid = validate(Grid, {**keys, "budget": {}}, where="comparison")
    ends = dict(named) if iterations is None else {**named, "iterations": iterations}

    def rows(method: Method) -> int:
        with naming_the_point(method):
            return planned_rows(method.configured(ends))

    return min(map(rows, grid.methods()))


def _resolved_keys(request: PartRequest, here: Path) -> dict[str, Any]:
    """The keys that a request or a part has, with absolute paths, and with the labels of `label=name` among the settings."""
    keys: dict[str, Any] = {
        key: value for key in PartRequest.model_fields if (value := getattr(request, key)) is not None and value != []
    }
    settings = placed_keys(placed(keys.get("settings", {}), None), here)
    for key in ("objective", "sampler", "seed"):
        if key in settings:
            instead = f"--{key}s" if key == "seed" else f"--{key}s, and settings from {key}s.NAME.{key}.KEY=VALUE"
            raise UserError(f"a comparison takes its {key}s from {instead}; leave out {key}")
    for axis in ("objectives", "samplers"):
        if not _holds_settings_by_name(settings.get(axis) or {}):
            example = f"{axis}.{(keys.get(axis) or ['NAME'])[0]}.optimizer.lr"
            raise UserError(f"{axis} holds settings by name, such as {example}, got {settings[axis]!r}")
        if axis in keys:
            labels = _labels(axis, keys[axis])
            of_label = {label: {axis.removesuffix("s"): {"name": name}} for label, name in labels.items() if name}
            settings[axis] = merged_layers(settings.get(axis) or {}, of_label)
            keys[axis] = list(labels)
    if "tasks" in keys:
        keys["tasks"] = _unique(tasks_path(task, here) for task in keys["tasks"])
    elif settings.get("task"):
        keys["tasks"] = [settings["task"]]
    if "sweep" in keys:
        keys["sweep"] = flattened(keys["sweep"])
    if "seeds" in keys:
        keys["seeds"] = _unique(keys["seeds"])
    for key in ("backbone", "preset", "threads"):
        if key not in keys and settings.get(key) and isinstance(settings[key], str | int):
            keys[key] = settings[key]
    if "backbone" in keys:
        keys["backbone"] = placed_keys({"backbone": keys["backbone"]}, here)["backbone"]
    own_budget = settings.pop("budget", None) or {}
    if own_budget or "budget" in keys:
        keys["budget"] = {**own_budget, **(keys.get("budget") or {})}
    keys["settings"] = {k: v for k, v in settings.items() if k not in ("task", "preset", "threads") and v != {}}
    return keys


def _holds_settings_by_name(settings: Any) -> bool:
    return isinstance(settings, Mapping) and all(below is None or isinstance(below, Mapping) for below in settings.values())


def _labels(axis: str, items: Iterable[str]) -> dict[str, str]:
    """The label of each `name` or `label=name`, with the name it stands for; the name is empty where there is no label."""
    labels: dict[str, str] = {}
    for item in items:
        label, equals, name = item.partition("=")
        if not label or (equals and not name):
            raise UserError(f"--{axis} takes names, or label=name, with commas; got {item!r}")
        if label in labels:
            instead = "choose another label for one of them" if name != labels[label] else "leave one of them out"
            raise UserError(f"--{axis} has {label} twice; {instead}")
        labels[label] = name
    return labels


def _check_labels(base: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError where a name has settings but is not compared, or a label is the name of a plug-in."""
    grids = _grids(base, parts)
    for axis in ("objectives", "samplers"):
        one, compared = axis.removesuffix("s"), set[str]()
        for grid in grids:
            settings = grid["settings"].get(axis) or {}
            stands_for = {label: plugin_name(one, settings, label) for label in grid[axis]}
            compared |= {*stands_for, *stands_for.values()}
            for label, name in stands_for.items():
                if name != label and label in names(axis):
                    raise UserError(
                        f"{axis}.{label} names {name}, but {label} is already one of the {axis}; choose another label"
                    )
        for grid in grids:
            for label in grid["settings"].get(axis) or {}:
                if label not in compared:
                    raise UserError(f"{axis}.{label} has settings but is not compared{did_you_mean(label, compared)}")


def _grids(base: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys of each part's grid, or of the grid itself without parts."""
    of_parts = [{**base, **part, "settings": merged_layers(base["settings"], part["settings"])} for part in parts.values()]
    return of_parts or [dict(base)]


def _resolve_sweeps(base: dict[str, Any], parts: Mapping[str, dict[str, Any]]) -> None:
    """Gives each sweep of a grid and of its parts all its values, in place.

    Raises:
        UserError: a sweep is wrong; that of a part must fit the part, that of the grid any of its parts.
    """

    def pairs(grid: Mapping[str, Any]) -> list[Pair]:
        known = [
            [(label, plugin_name(axis.removesuffix("s"), grid["settings"].get(axis) or {}, label)) for label in grid[axis]]
            for axis in ("objectives", "samplers")
        ]
        return [Pair(objective, sampler) for objective, sampler in product(*known)]

    grids = _grids(base, parts)
    for part, grid in zip(parts.values(), grids, strict=False):
        if "sweep" in part:
            part["sweep"] = resolved(part["sweep"], pairs(grid))
    if base.get("sweep"):
        base["sweep"] = resolved(base["sweep"], list(dict.fromkeys(pair for grid in grids for pair in pairs(grid))))


def _refuse_equal_methods(methods: list[Method]) -> None:
    """Raises UserError where two methods differ in their label or part alone, and share a task and a seed."""
    plain = [_without_label(method.config) for method in methods]
    for (one, first), (other, second) in combinations(zip(methods, plain, strict=True), 2):
        shared = set(one.grid.tasks) & set(other.grid.tasks) and set(one.grid.seeds) & set(other.grid.seeds)
        if first != second or not shared:
            continue
        if one.part != other.part:
            raise UserError(f"{one} and {other} have identical settings; leave one of them out")
        kind = "objective" if one.objective != other.objective else "sampler"
        how = f"--set {kind}s.{getattr(other, kind)}.{kind}.KEY=VALUE"
        raise UserError(f"{one} and {other} have identical settings; say how they differ with {how}")


def _without_label(config: RunConfig) -> dict[str, Any]:
    resolved = {k: v for k, v in config.resolved().items() if k not in ("task", "seed")}
    return {k: {**v, "label": None} if k in ("objective", "sampler") else v for k, v in resolved.items()}


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
