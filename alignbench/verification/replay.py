"""Runs a cell again from its record, and says whether the same comes out.

On the same versions of the software and the same kind of machine every number must be equal to the bit, since noise, plans and
the order of prompts are functions of the seed. Elsewhere float32 operations round differently in their last bits; training
amplifies that, and a scorer may read an image differently. A replay then counts as equal if

- it has the same iterations and model rows, which no rounding can change,
- it starts from the same rewards (`FIRST_REWARD`), where no update has amplified anything, and
- each mean of the base and of the trained model is within `TOLERANCE` of half the recorded 95 % interval, which is one standard
  error of the mean. docs/verify.md has what rounding was measured to do.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.backbone import device_named
from alignbench.config.run_config import RunConfig, load_config
from alignbench.errors import UserError
from alignbench.evaluation import curve
from alignbench.evaluation.evaluate import Evaluation
from alignbench.load import threads_of
from alignbench.records.environment import environment
from alignbench.records.record import CONFIG, Estimate, Result
from alignbench.records.tables import EVALS, METRICS, read_evals, read_metrics
from alignbench.tasks import changed_parts, configured_task
from alignbench.training.progress import Console
from alignbench.training.run import run
from alignbench.verification.comparison_checks import MACHINE
from alignbench.verification.record import CellFinding
from alignbench.verification.run_checks import CheckedRun

TOLERANCE = 0.5
"""Share of half the recorded 95 % interval by which a mean may differ on other software or another machine: twice the largest
that was measured."""
WITHOUT_INTERVAL = 1e-3
"""Relative difference of a mean that has no interval, such as one of equal values."""
FIRST_REWARD = 1e-3
"""Relative difference of the mean reward of the first rollout, which is the base model's."""
CODE = ("alignbench", "git_revision", "python", "torch", "libraries")
_KERNEL = re.compile(r"^([^-]+)-.*?-(x86_64|amd64|aarch64|arm64)")
"""The version of the operating system's kernel in `platform`, which has no part in the numbers."""


def refuse_unrepeatable(name: str, result: Result) -> None:
    """Refuses a run that no replay can give again.

    Args:
        name: the cell.
        result: its record.

    Raises:
        UserError: it ended by seconds, its reward changed on the way, or its reward came from a service. The service, and the
            token that it would get, are the choice of whoever wrote the record.
    """
    if result.config.get("scorer_url") is not None:
        raise UserError(
            f"the reward of {name} came from the scorer at its scorer_url, which is not asked; choose other --cells"
        )
    if (result.config.get("budget") or {}).get("seconds") is not None:
        raise UserError(f"{name} has a budget in seconds, so how far it came depends on the machine; choose other --cells")
    changed = next((alarm for alarm in result.alarms if " changed after iteration " in alarm), None)
    if changed is not None:
        raise UserError(f"{name} cannot be replayed: {changed}; choose other --cells")


def replay(name: str, checked: CheckedRun, folder: Path, bases: dict[str, Evaluation], console: Console) -> CellFinding:
    """Runs a cell again and compares the outcome with its record.

    Args:
        name: the cell.
        checked: its folder, in which nothing is wrong.
        folder: a new folder for the replay.
        bases: evaluations of base models that replays share.
        console: shows the progress.

    Raises:
        UserError: it cannot be run here, for instance because its task is missing or has another content.
        RunError: the replay failed.
    """
    recorded = checked.result
    assert recorded is not None
    refuse_unrepeatable(name, recorded)
    config = replay_config(checked.folder, recorded)
    changed = changed_parts(configured_task(config).fingerprint(), recorded.task)
    if changed:
        raise UserError(f"the {' and '.join(changed)} of task {config.task} changed since {name} was run; restore its files")
    replayed = run(config, folder, console=console, bases=bases)
    now = environment(replayed.environment["device"], threads_of(config), 1)
    elsewhere = list(differing_environment(recorded.environment, now))
    difference = next(differences(checked, folder), None)
    if difference is None:
        return CellFinding(cell=name, state="equal", detail=_other(elsewhere))
    if not elsewhere:
        return CellFinding(cell=name, state="not equal", detail=difference)
    beyond = next(beyond_tolerance(checked, replayed, folder), None)
    if beyond is not None:
        return CellFinding(cell=name, state="not equal", detail=f"{beyond}{_other(elsewhere, '; ')}")
    return CellFinding(cell=name, state="equal within tolerance", detail=f"{difference}{_other(elsewhere, '; ')}")


def _other(elsewhere: list[str], before: str = "") -> str:
    return f"{before}other {', '.join(elsewhere)} than the run had" if elsewhere else ""


def replay_config(folder: Path, recorded: Result) -> RunConfig:
    """The configuration of a run, with the threads and the device that it had, and without what changes no number."""
    config = load_config(file=folder / CONFIG)
    had = recorded.environment
    device = str(had.get("device") or config.device)
    if config.device == "auto" and _is_here(device):
        config = config.model_copy(update={"device": device})
    threads = had.get("threads")
    update: dict[str, Any] = {"save_images": False, "trackers": (), "sharded": False, "scorer_token_file": None}
    return config.model_copy(update=update | ({"threads": threads} if isinstance(threads, int) and threads > 0 else {}))


def _is_here(device: str) -> bool:
    try:
        device_named(device)
    except UserError:
        return False
    return True


def differing_environment(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the software and the machine on which bits depend and in which two environments differ.

    A checkout with local changes (`-dirty`) is never known to be the same code.
    """
    for key in (*CODE, *MACHINE):
        before, after = then.get(key), now.get(key)
        if key == "platform":
            before, after = (_KERNEL.sub(r"\1-\2", str(each)) for each in (before, after))
        if before != after or (key == "git_revision" and str(after).endswith("-dirty")):
            yield key


def differences(checked: CheckedRun, folder: Path) -> Iterator[str]:
    """A clause for each number of a run that its replay does not have to the bit; seconds do not count.

    Args:
        checked: the run.
        folder: the folder of its replay.
    """
    tables = (
        (METRICS, checked.metrics, read_metrics(folder), ["iteration"]),
        (EVALS, checked.evals, read_evals(folder), ["phase", "metric", "prompt_index", "image"]),
        (curve.FILE, curve.read_curve(checked.folder), curve.read_curve(folder), ["iteration", "metric", "prompt_index"]),
    )
    for file, then, now, keys in tables:
        yield from _differing_rows(file, then, now, keys)


def _differing_rows(file: str, then: pd.DataFrame | None, now: pd.DataFrame | None, keys: list[str]) -> Iterator[str]:
    """A clause for the first differing row of each column of a table."""
    if then is None or now is None:
        if (then is None) != (now is None):
            yield f"{file} is {'missing' if now is None else 'new'} in the replay"
        return
    before, after = (table.sort_values(keys, ignore_index=True) for table in (then, now))
    if not before[keys].equals(after[keys]):
        yield f"{file} has {len(before):,} rows, and {len(after):,} or others in the replay"
        return
    for column in before.columns:
        if column in keys or column.startswith("seconds"):
            continue
        if column not in after:
            yield f"{file} has no column {column} in the replay"
            continue
        apart = _apart(before[column], after[column])
        if len(apart):
            row = int(apart[0])
            place = ", ".join(f"{key} {before[key].iloc[row]}" for key in keys)
            a, b = before[column].iloc[row], after[column].iloc[row]
            yield f"{file}: {column} at {place} is {a!r}, and {b!r} in the replay".replace("np.float64", "")


def _apart(then: pd.Series, now: pd.Series) -> np.ndarray:
    """The rows in which two columns differ; missing values are equal."""
    same = (then == now) | (then.isna() & now.isna())
    return np.flatnonzero(~same.to_numpy(dtype=bool))


def beyond_tolerance(checked: CheckedRun, replayed: Result, folder: Path) -> Iterator[str]:
    """A clause for each number of a replay elsewhere that is further from the run than rounding explains.

    Args:
        checked: the run.
        replayed: the record of its replay.
        folder: the folder of its replay.
    """
    recorded = checked.result
    assert recorded is not None
    counts = ("model_rows_rollout", "model_rows_train", "reward_calls")
    spent = [(key, getattr(recorded.budget, key), getattr(replayed.budget, key)) for key in counts]
    for key, then, now in [("iterations", recorded.run.iterations, replayed.run.iterations), *spent]:
        if then != now:
            yield f"{key} {then:,}, and {now:,} in the replay"
    table = read_metrics(folder)
    if checked.metrics is not None and table is not None and len(table):
        then, now = (float(each["reward"].iloc[0]) for each in (checked.metrics, table))
        if not math.isclose(then, now, rel_tol=FIRST_REWARD, abs_tol=FIRST_REWARD):
            yield f"the first rollout's reward is {then:.6g}, and {now:.6g} in the replay"
    for metric, record in recorded.metrics.items():
        for phase in ("base", "final"):
            then, now = getattr(record, phase), getattr(replayed.metrics.get(metric, record), phase)
            if not within_tolerance(then, now):
                yield f"{metric} {phase} is {_number(then)}, and {_number(now)} in the replay"


def within_tolerance(then: Estimate, now: Estimate) -> bool:
    """Whether a mean of a replay elsewhere is as near to the recorded one as rounding may leave it."""
    if then.value is None or now.value is None:
        return then.value is now.value
    if then.lower is None or then.upper is None:
        allowed = WITHOUT_INTERVAL * max(1.0, abs(then.value))
    else:
        allowed = TOLERANCE * (then.upper - then.lower) / 2
    return abs(then.value - now.value) <= allowed


def _number(estimate: Estimate) -> str:
    return "null" if estimate.value is None else f"{estimate.value:.6g}"
