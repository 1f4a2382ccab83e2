"""Runs a tuning: runs its trials as a comparison, scores them, and writes the tuned settings and the sensitivities."""

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.comparison import runner
from alignbench.comparison.grid import SETTINGS as COMPARISON
from alignbench.comparison.grid import read_grid
from alignbench.comparison.record import RUNS, ComparisonRecord
from alignbench.comparison.tuned import FIRST_TUNING_SEED, Tuned, content_hash, task_hash
from alignbench.config.run_config import merged_layers, read_settings
from alignbench.errors import UserError
from alignbench.files.paths import absolute
from alignbench.files.writing import exclusive, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.registry import file_name
from alignbench.settings import validate
from alignbench.tuning.planning import SETTINGS, Plan, Trial, TuningRequest, task_file
from alignbench.tuning.record import RECORD, MethodRecord, TrialRecord, TuningRecord
from alignbench.tuning.scores import Scores, score_runs
from alignbench.tuning.sensitivity import TABLE, trials_table
from alignbench.tuning.space import nested

TUNED, FIGURE = "tuned.yaml", "sensitivity.png"
HEADING = (
    "# Written by `alignbench tune`, which rewrites it on every call. To use it: alignbench compare --config FILE --seeds 5\n"
)


class Tuning(NamedTuple):
    """A tuning that has been run.

    Attributes:
        plan: the plan.
        record: every trial with its scores.
        tuned: the file for `compare --config`; None while a method has no trial with a score.
    """

    plan: Plan
    record: TuningRecord
    tuned: Path | None


def read_request(folder: Path) -> TuningRequest | None:
    """Reads what the tuning in a folder tunes; None if the folder has no tuning.

    Raises:
        UserError: the file is not valid, or the folder has a comparison that is not a tuning.
    """
    file = folder / SETTINGS
    if file.is_file():
        return validate(TuningRequest, read_settings(file, "tuning"), where=str(file))
    if (folder / COMPARISON).is_file() and min(read_grid(folder).seeds) < FIRST_TUNING_SEED:
        raise UserError(f"{folder} holds a comparison, not a tuning; choose another --out")
    return None


def with_options(former: TuningRequest | None, options: Mapping[str, Any]) -> TuningRequest:
    """Updates the request of a folder by the options of a command; `settings` are merged.

    Args:
        former: the request of the folder; None for a new folder.
        options: option -> value; None for options that were not given.

    Raises:
        UserError: an option is wrong, or asks for fewer trials or seeds than there are.
    """
    chosen = {key: value for key, value in options.items() if value is not None}
    own = former.model_dump() if former else {}
    if former and "settings" in chosen:
        chosen["settings"] = merged_layers(former.settings, chosen["settings"])
    request = validate(TuningRequest, {**own, **chosen}, where="tuning")
    for key in ("trials", "seeds"):
        if former and getattr(request, key) < getattr(former, key):
            raise UserError(
                f"the folder already has {getattr(former, key)} {key}, which can only be raised; choose another --out"
            )
    return request


def run_tuning(plan: Plan, folder: Path, observer: runner.Observer | None = None, **execution: Any) -> Tuning:
    """Runs the trials that have no record yet, and chooses the best trial of each method.

    Args:
        plan: the plan of the tuning.
        folder: a new folder, or that of an earlier tuning, which is resumed.
        observer: receives the progress.
        execution: further arguments of `runner.compare`, such as `workers`.

    Raises:
        UserError: the folder holds something else, or trials with other settings.
        KeyboardInterrupt: the user interrupted it. The running trials have written a checkpoint; the same call resumes them.
    """
    read_request(folder)
    grid = plan.grid_in(folder)
    runner.check_execution(grid, execution.get("engine", "local"), execution.get("processes", 1))
    runner.check_folder(grid.cells(), folder)
    _score(plan, [folder / RUNS / cell.id for cell in runner.done(grid.cells(), folder)])  # refuses an unknown score
    with exclusive(folder):
        _write_yaml(folder / COMPARISON, grid.model_dump(mode="json"))  # marks the folder as one of a tuning
        _write_yaml(folder / SETTINGS, plan.request.model_dump(mode="json", exclude_none=True))
        _write_yaml(task_file(plan.task, folder), _task_data(plan))
    command = shlex.join(["alignbench", "tune", "--out", str(absolute(folder))])
    done = runner.compare(grid, folder, command=command, observer=observer, **execution)
    record = record_of(plan, done, folder)
    record.write(folder / RECORD)
    write_atomically(folder / TABLE, partial(trials_table(record).to_csv, index=False))
    from alignbench.figures.style import write_figure
    from alignbench.tuning.figure import draw_sensitivity

    if any(method.scored for method in record.methods):
        write_figure(folder / FIGURE, draw_sensitivity(record))
    tuned = folder / TUNED if all(method.best for method in record.methods) else None
    if tuned:
        _write_yaml(tuned, tuned_comparison(plan, record), HEADING)
    return Tuning(plan, record, tuned)


def record_of(plan: Plan, done: ComparisonRecord, folder: Path) -> TuningRecord:
    """Makes the record of a tuning, with the scores of all trials.

    Args:
        plan: the plan of the tuning.
        done: the comparison of the trials.
        folder: folder of the tuning.
    """
    request, grid = plan.request, plan.trial_grid
    complete = {(c.objective, c.sampler, c.seed): folder / RUNS / c.id for c in done.cells if c.status == "complete"}
    errors = {(c.objective, c.sampler): c.error for c in done.cells if c.error}
    scores = _score(plan, list(complete.values()))

    def trial_record(number: int, trial: Trial, sampler: str) -> TrialRecord:
        folders = [complete.get((trial.label, sampler, seed)) for seed in request.tuning_seeds]
        return TrialRecord(
            trial=number,
            settings=trial.settings,
            place=list(trial.place),
            scores=[None if run is None else scores.by_run[run] for run in folders],
            error=errors.get((trial.label, sampler)),
        )

    methods = [
        MethodRecord(
            objective=objective,
            sampler=sampler,
            trials=[trial_record(number, trial, sampler) for number, trial in enumerate(trials)],
        )
        for objective, trials in plan.trials.items()
        for sampler in grid.samplers
    ]
    prompts = int(grid.settings["evaluation"]["prompts"])
    return TuningRecord(request=request, scored_by=scores.meaning, prompts=prompts, methods=methods)


def _score(plan: Plan, runs: list[Path]) -> Scores:
    standardise = plan.trial_grid.methods()[0].config.normalise_rewards
    return score_runs(runs, plan.request.select, plan.weights, standardise=standardise)


def tuned_comparison(plan: Plan, record: TuningRecord) -> dict[str, Any]:
    """Makes the content of the comparison file with each method's best settings; several samplers have a part each.

    Args:
        plan: the plan of the tuning.
        record: its record, in which every method has a best trial.
    """
    base, request = plan.base, plan.request
    by_sampler: dict[str, dict[str, Any]] = {sampler: {} for sampler in base.samplers}
    for method in record.methods:
        if method.best is not None:
            by_sampler[method.sampler][method.objective] = nested(method.best.settings)
    data: dict[str, Any] = {
        "description": f"{plan.task.name}: every method tuned by {request.trials} trials, chosen by {request.select}",
        "objectives": base.objectives,
        "samplers": base.samplers,
        "tasks": base.tasks,
        "backbone": base.backbone,
        "preset": base.preset,
        "budget": base.budget.model_dump(exclude_none=True),
        "settings": base.settings,
        "tuned": _provenance(plan, record).model_dump(mode="json"),
    }
    if len(base.samplers) == 1:
        data["settings"] = merged_layers(base.settings, {"objectives": by_sampler[base.samplers[0]]})
    else:
        data["parts"] = {
            file_name(sampler): {"samplers": [sampler], "settings": {"objectives": settings}}
            for sampler, settings in by_sampler.items()
        }
    return data


def _provenance(plan: Plan, record: TuningRecord) -> Tuned:
    return Tuned(
        task=plan.base.tasks[0],
        backbone=plan.base.backbone,
        trials=plan.request.trials,
        seeds=plan.request.tuning_seeds,
        select=plan.request.select,
        task_hash=task_hash(plan.task),
        trials_hash=content_hash([method.model_dump(mode="json") for method in record.methods]),
    )


def _task_data(plan: Plan) -> dict[str, Any]:
    return plan.task.on_validation_prompts().model_dump(mode="json", exclude_none=True)


def _write_yaml(file: Path, data: Mapping[str, Any], heading: str = "") -> None:
    write_atomically(file, lambda path: path.write_text(heading + to_yaml(data), encoding="utf-8"))
