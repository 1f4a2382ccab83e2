"""Whether the files of one run agree with each other. Nothing is run again and no model is loaded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.comparison.reading import dotted_differences
from alignbench.config.run_config import PLUGINS, RESULT_NEUTRAL_KEYS, read_settings, with_present_names
from alignbench.errors import UserError
from alignbench.evaluation import curve
from alignbench.evaluation.onset import onsets
from alignbench.records.digests import changed_files, has_digests
from alignbench.records.record import CONFIG, RESULT, Result, read_result
from alignbench.records.tables import EVALS, METRICS, read_evals, read_metrics
from alignbench.training.checkpoint import Checkpoint, DamagedCheckpointError, saved_states
from alignbench.verification.recomputed import differing_estimates, missing_rows

EXTENDED = ("iterations",)
"""Keys that may differ between a run and its older checkpoints: a run can be extended."""


@dataclass
class CheckedRun:
    """A run's folder after its files were compared with each other.

    Attributes:
        folder: the run's folder.
        result: its record; None if it cannot be read.
        problem: the sentence that says what is wrong with it; None if nothing is.
        notes: what could not be checked, and why.
        evals, metrics: its tables, where they can be read.
    """

    folder: Path
    result: Result | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    evals: pd.DataFrame | None = None
    metrics: pd.DataFrame | None = None


def check_run(folder: Path) -> CheckedRun:
    """Compares the files of a run's folder with each other; the first disagreement is the problem.

    The record is compared with the configuration, the means and intervals with the scores of the images, the counts with the
    table of iterations, the curve and the checkpoints, and all files with their digests.
    """
    checked = CheckedRun(folder)
    try:
        checked.result = result = read_result(folder)
        checked.evals, checked.metrics = read_evals(folder), read_metrics(folder)
        checks = (
            _config_problems(checked, result),
            _eval_problems(checked, result),
            _metrics_problems(checked, result),
            _curve_problems(checked, result),
            _checkpoint_problems(checked, result),
            changed_files(folder),
        )
        checked.problem = next(chain(*checks), None)
    except UserError as error:
        checked.problem = str(error)
    if not has_digests(folder):
        checked.notes.append(f"{folder} has no SHA256SUMS: its run ended before runs left the digests of their files")
    return checked


def _config_problems(checked: CheckedRun, result: Result) -> Iterator[str]:
    """Whether `config.yaml`, the configuration in the record, and what the record says was run are the same."""
    file = checked.folder / CONFIG
    if not file.is_file():
        yield f"{file} is missing"
        return
    for key, in_file, in_record in dotted_differences(read_settings(file), with_present_names(result.config)):
        yield f"{file} has {key} {in_file} where {RESULT} has {in_record}"
    info, config = result.run, result.config
    said = {kind: getattr(info, kind) for kind in PLUGINS} | {"seed": info.seed, "preset": info.preset}
    for key, value in said.items():
        configured = config.get(key)
        configured = configured.get("name") if isinstance(configured, Mapping) else configured
        if configured is not None and configured != value:
            yield f"{checked.folder / RESULT} says that {key} was {value}, and its configuration says {configured}"


def _eval_problems(checked: CheckedRun, result: Result) -> Iterator[str]:
    """Whether the scores of the images are complete and give the record's means and intervals."""
    if not result.metrics:
        yield f"{checked.folder / RESULT} holds no metric"
    elif checked.evals is None:
        yield f"{checked.folder / EVALS} is missing"
    else:
        yield from missing_rows(checked.evals, result, checked.folder)
        yield from differing_estimates(checked.evals, result, checked.folder)


def _metrics_problems(checked: CheckedRun, result: Result) -> Iterator[str]:
    """Whether the table has a row for each iteration and ends with what the record says was used."""
    table, file, iterations = checked.metrics, checked.folder / METRICS, result.run.iterations
    if table is None:
        if iterations:
            yield f"{file} is missing"
        return
    if list(table["iteration"]) != list(range(iterations)):
        yield f"{file} does not have the {iterations} iterations of {RESULT}, each in a row"
        return
    budget = result.budget
    spent = {"model_rows": budget.model_rows_rollout + budget.model_rows_train}
    spent |= {key: getattr(budget, key) for key in ("model_rows_rollout", "model_rows_train", "reward_calls")}
    for key, value in spent.items():
        if key in table and len(table) and int(table[key].iloc[-1]) != value:
            yield f"{file} ends with {key} {int(table[key].iloc[-1]):,} where {RESULT} has {value:,}"


def _curve_problems(checked: CheckedRun, result: Result) -> Iterator[str]:
    """Whether the evaluations along the training are complete, lie on it, and give the record's onsets."""
    file = checked.folder / curve.FILE
    every = (result.config.get("evaluation") or {}).get("every")
    table = curve.read_curve(checked.folder)
    if table is None:
        if every and result.run.iterations and "validation prompts" in result.task:
            yield f"{file} is missing, and evaluation.every is {every}"
        return
    counts = table.groupby("iteration").size()
    if counts.index[0] != 0 or counts.index[-1] != result.run.iterations or counts.nunique() > 1:
        yield f"{file} lacks rows: it should have all of its metrics from iteration 0 to {result.run.iterations}"
    first = table.drop_duplicates("iteration")
    for iteration, rows in zip(first["iteration"].tolist(), first["model_rows"].tolist(), strict=True):
        if checked.metrics is None or iteration > len(checked.metrics):
            break
        spent = int(checked.metrics["model_rows"].iloc[iteration - 1]) if iteration else 0
        if rows != spent:
            yield f"{file} has {rows:,} model rows at iteration {iteration} where {METRICS} has {spent:,}"
    yield from _onset_problems(table, result, checked.folder)


def _onset_problems(table: pd.DataFrame, result: Result, folder: Path) -> Iterator[str]:
    rewards = list(dict.fromkeys(each.reward for each in result.onsets))
    directions = {name: m.higher_is_better for name, m in result.metrics.items() if m.role == "judge"}
    computed = {(each.reward, each.metric): each for each in onsets(table, rewards, directions)} if rewards else {}
    for recorded in result.onsets:
        again = computed.get((recorded.reward, recorded.metric))
        if again is None or (again.iteration, again.over_optimised) != (recorded.iteration, recorded.over_optimised):
            turn = f"{recorded.metric} turned at iteration {recorded.iteration}"
            yield f"{folder / RESULT} says that {turn}, and {curve.FILE} does not"


def _checkpoint_problems(checked: CheckedRun, result: Result) -> Iterator[str]:
    """Whether the checkpoints that are there are those of this run."""
    folder = checked.folder / "checkpoints"
    try:
        states = saved_states(folder)
    except DamagedCheckpointError as error:
        yield str(error)
        return
    except UserError as error:
        checked.notes.append(f"the checkpoints were not compared with the record: {error}")
        return
    for state in states:
        yield from _state_problems(state, folder / f"iteration-{state.iteration}", checked, result)
    if states and states[-1].iteration != result.run.iterations:
        yield f"{folder} ends with iteration {states[-1].iteration} where {RESULT} has {result.run.iterations}"


def _state_problems(state: Checkpoint, path: Path, checked: CheckedRun, result: Result) -> Iterator[str]:
    for key, there, here in dotted_differences(state.config, result.config):
        is_newer = there is None  # than the alignbench that wrote the checkpoint
        if not is_newer and key.partition(".")[0] not in (*RESULT_NEUTRAL_KEYS, *EXTENDED):
            yield f"{path} is a checkpoint of another run: its {key} is {there}, and that of {RESULT} is {here}"
            return
    table = checked.metrics
    rewards = np.array([row.get("reward", np.nan) for row in state.metrics], dtype=np.float64)
    if table is not None and not np.array_equal(rewards, _rewards(table)[: state.iteration], equal_nan=True):
        yield f"{path} is a checkpoint of another run: it has other training rewards than {METRICS}"


def _rewards(table: pd.DataFrame) -> Any:
    return table["reward"].to_numpy(dtype=np.float64)
