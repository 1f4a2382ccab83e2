"""Checkpoints: everything that a run needs to continue as if it had never stopped.

A checkpoint is a folder `iteration-N` that exists whole or not at all. It holds tensors as safetensors, the rest in
`state.json`, and the SHA-256 of each file in `SHA256SUMS`, which `sha256sum -c` reads. Noise, plans, the order of prompts and
the draws of the global generators are functions of the seed and the iteration, so no generator's state has to be saved.
"""

import json
import math
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from alignbench import tasks
from alignbench.backbone import Backbone, temporarily_set
from alignbench.config.run_config import RESULT_NEUTRAL_KEYS, RunConfig
from alignbench.errors import UserError
from alignbench.files.digests import SUMS, sums_text
from alignbench.files.opening import sha256_of
from alignbench.files.writing import is_litter, write_folder
from alignbench.runtime.processes import SINGLE_PROCESS, Processes
from alignbench.training.tensors import AVERAGE, WEIGHTS, PolicyWeights, TrainedTensors, load_list

VERSION = 4
REPLACEABLE = ("reward", "judges")
"""Parts of a task that may differ when a run resumes: a failed scorer can be replaced. The record names a changed reward."""
STATE = "state.json"


class Checkpoint(BaseModel):
    """The content of `state.json`: where the run stands and what it has measured."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    version: int = VERSION
    iteration: int
    config: dict[str, Any]
    task: dict[str, str] = {}
    """The fingerprint of the task (see `tasks.Task.fingerprint`) and of the fixed pairs; empty in checkpoints that lack it."""
    changes: list[str] = []
    """A sentence for each time that the run was resumed with another reward."""
    budget: dict[str, Any]
    metrics: list[dict[str, Any]]
    objective: dict[str, Any] = {}
    """The objective's state, from earlier rollouts."""
    sampler: dict[str, Any] = {}
    """The sampler's state, from earlier rollouts."""
    ratio_deviation: float
    """The largest |ratio - 1| of any first update after a rollout."""
    started: str
    reference_since: int = 0
    """How many iterations were done when the reference was last refreshed."""
    micro_batch: int | None = None
    """Rows in one model call, after it was halved whenever memory ran out; None for all rows."""
    micro_batch_halvings: int = 0
    """How often it was halved."""
    best: int | None = None
    """The iteration with the best validation metric so far, where `best_by` names one."""
    weights_from: int | None = None
    """The iteration whose tensors it holds, where a stop rule returned to an earlier one; null for its own."""
    gradients: list[dict[str, dict[str, float]]] = []
    """What was measured of the loss's parts and terms in the first updates; see `alignbench.training.dead_terms`."""


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    trained: TrainedTensors,
    *,
    keep: int = 1,
    best_window: int | None = None,
    also: Collection[int] = (),
    replace: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> Path:
    """Writes the checkpoint `folder/iteration-N`, whole or not at all, and removes checkpoints that are no longer kept.

    An undamaged checkpoint of the same iteration stays as it is, unless `replace` is set.

    Args:
        checkpoint: the state of the run.
        trained: the tensors of the run.
        keep: how many of the newest checkpoints are kept.
        best_window: the window by which the best checkpoint is chosen and kept as well; None keeps no best one.
        also: iterations whose checkpoints are kept as well.
        replace: whether it replaces a checkpoint of the same iteration.
        processes: the ranks that hold the tensors together; rank 0 writes.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"iteration-{checkpoint.iteration}"
    tensors = trained.by_file()

    def write(partial: Path) -> None:
        for name, named_tensors in tensors.items():
            save_file(named_tensors, partial / name)
        (partial / STATE).write_text(checkpoint.model_dump_json(), encoding="utf-8")
        sums = sums_text({file.name: sha256_of(file) for file in partial.iterdir()})
        (partial / SUMS).write_text(sums, encoding="utf-8")

    def place() -> None:
        if replace or _fault(final):
            write_folder(final, write)
        _remove_others(folder, checkpoint, keep, best_window, also)

    processes.on_rank_zero(place)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder has a checkpoint from which a run can resume."""
    return bool(_saved(folder))


def saved_states(folder: Path) -> list[Checkpoint]:
    """The states of all checkpoints in the folder, the oldest first.

    Raises:
        DamagedCheckpointError: a file of one of them differs from what was written.
        UserError: another version wrote one.
    """
    return [_read_state(path) for path in _saved(folder).values()]


def best_iteration(iterations: Iterable[int], metrics: Sequence[Mapping[str, Any]], window: int) -> int | None:
    """The iteration whose checkpoint has the highest training reward, averaged over the `window` iterations before it.

    The reward is that of rollouts on training prompts, which costs nothing. Evaluation prompts must not choose the model that
    they evaluate: its score would be the maximum of several noisy scores, and too high. For the same reason a run's record is
    about its last weights, never about its best.

    Args:
        iterations: those that have a checkpoint.
        metrics: one row for each iteration, from the first on.
        window: how many iterations the mean is over.

    Returns:
        The newest of equally good ones; None where no checkpoint has `window` iterations before it.
    """
    scores = {}
    for n in iterations:
        rewards = [row["reward"] for row in metrics[max(n - window, 0) : n] if not math.isnan(row["reward"])]
        if n >= window and rewards:
            scores[n] = sum(rewards) / len(rewards)
    return max(scores, key=lambda n: (scores[n], n)) if scores else None


def policy_weights(folder: Path, best_window: int | None = None, best_by: str | None = None) -> PolicyWeights:
    """The policy's weights in the newest checkpoint, or in the best one, for evaluating and exporting.

    Args:
        folder: the run's folder of checkpoints.
        best_window: choose the best checkpoint by this window, see `best_iteration`; None for the newest.
        best_by: choose the checkpoint that had the best value of this validation metric, by which the run kept it.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    saved = _saved(folder)
    if not saved:
        raise UserError(f"{folder.parent} has no checkpoint")
    chosen = max(saved)
    if best_by is not None:
        best = _read_state(saved[chosen]).best
        if best not in saved:
            raise UserError(f"{folder.parent} has no checkpoint that was chosen by {best_by}")
        chosen = best
    elif best_window is not None:
        best = best_iteration(saved, _read_state(saved[chosen]).metrics, best_window)
        if best is None:
            raise UserError(f"no checkpoint of {folder.parent} has best_window={best_window} iterations behind it")
        chosen = best
    path = saved[chosen]
    held = _read_state(path).weights_from
    iteration = chosen if held is None else held
    if (path / AVERAGE).exists():
        return PolicyWeights("ema", iteration, load_list(path / AVERAGE))
    return PolicyWeights("raw", iteration, load_file(path / WEIGHTS))


@dataclass(frozen=True)
class Restored:
    """What `load_checkpoint` read beside the tensors.

    Attributes:
        checkpoint: the state of the run.
        passed_over: a sentence for each newer checkpoint that is damaged.
    """

    checkpoint: Checkpoint
    passed_over: list[str]


def judged_weights(policy: Backbone, weights: PolicyWeights | None) -> AbstractContextManager[None]:
    """While entered, the policy has these weights; with None it is the base model."""
    if weights is None:
        return policy.reference()
    return temporarily_set(list(policy.parameters()), weights.in_order(policy.trainable()))


def load_checkpoint(
    folder: Path,
    config: dict[str, Any],
    trained: TrainedTensors,
    task: Mapping[str, str] | None = None,
) -> Restored:
    """Restores the newest undamaged checkpoint in `folder`.

    A damaged checkpoint is passed over, since the run comes to the same place again from an older one.

    Args:
        config: the resolved configuration of the run that resumes.
        trained: the tensors that are overwritten.
        task: the fingerprint of the task that the run trains on now; None to skip its comparison.

    Raises:
        UserError: there is no checkpoint, all are damaged, or the newest undamaged one has another version or model, or was
            made with other settings, prompts or pairs.
    """
    passed_over = []
    for path in reversed(_saved(folder).values()):
        try:
            checkpoint = _read_state(path)
            break
        except DamagedCheckpointError as error:
            passed_over.append(str(error))
    else:
        raise UserError("; ".join(passed_over) or f"{folder.parent} has no checkpoint")
    then = RunConfig().resolved() | checkpoint.config  # a setting that is newer than the run has its default
    changed = sorted(k for k in config if k not in RESULT_NEUTRAL_KEYS and _differs(config[k], then.get(k)))
    if _more_iterations(config, then):
        changed.remove("iterations")  # the run has checked that it can be extended
    if changed:
        raise UserError(f"{path} was made with other settings ({', '.join(changed)}); resume with the same ones")
    parts = tasks.changed_parts(task or {}, checkpoint.task)
    tasks.refuse_changed([part for part in parts if part not in REPLACEABLE], f"the checkpoint {path}")
    at = f"changed after iteration {checkpoint.iteration}: the training until then had another one"
    checkpoint.changes += [f"the {part} {at}" for part in parts if part == "reward"]
    trained.load(path, checkpoint.iteration)
    trained.objective.load_state(checkpoint.objective)
    return Restored(checkpoint, passed_over)


def _more_iterations(config: dict[str, Any], then: dict[str, Any]) -> bool:
    now, before = config.get("iterations"), then.get("iterations")
    return now is not None and before is not None and now > before


def load_tensors(folder: Path, iteration: int, trained: TrainedTensors) -> None:
    """Restores the tensors and the objective's state of one checkpoint; the counts of the run stay as they are.

    Raises:
        UserError: the checkpoint is not there, or it is damaged.
    """
    path = folder / f"iteration-{iteration}"
    checkpoint = _read_state(path)
    trained.load(path, iteration)
    trained.objective.load_state(checkpoint.objective)


def _differs(now: Any, then: Any) -> bool:
    """Whether a setting changed; a key that the older version did not have, or did not record, does not count."""
    if isinstance(now, dict) and isinstance(then, dict) and now.get("name") == then.get("name"):
        return any(_differs(value, then[key]) for key, value in now.items() if key in then) or bool({*then} - {*now})
    return bool(now != then)


class DamagedCheckpointError(UserError):
    """Raised if a checkpoint's files differ from what was written."""


def _read_state(path: Path) -> Checkpoint:
    """The state of a checkpoint, after its files have been compared with their sums.

    Raises:
        UserError: another version wrote it.
        DamagedCheckpointError: a file differs from what was written.
    """
    fault = _fault(path)
    if fault:
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {fault}")
    data = _state(path)
    if data.get("version") != VERSION:
        raise UserError(f"{path} has checkpoint version {data.get('version')}; this alignbench reads {VERSION}")
    return Checkpoint.model_validate(data)


def _state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`; raises DamagedCheckpointError where it is not a JSON object."""
    try:
        data = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {STATE} is not what was written")
    return data


def _fault(path: Path) -> str | None:
    """A clause that says how a checkpoint differs from what was written; None where it does not."""
    try:
        sums = (path / SUMS).read_bytes().decode()  # as text, other line ends would look alike
        listed = dict(line.split("  ", 1)[::-1] for line in sums.splitlines())
        there = {file.name for file in path.iterdir() if not is_litter(file.name)} - {SUMS}
        for name in sorted({*listed, *there}):
            if name not in there:
                return f"{name} is missing"
            if name not in listed:
                return f"{name} does not belong to it"
            if sha256_of(path / name) != listed[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError):
        return f"{SUMS} is missing or unreadable"
    if sums != sums_text(listed):
        return f"{SUMS} is not what was written"
    try:
        held = _state(path).get("iteration")
    except DamagedCheckpointError:
        return f"{STATE} is not what was written"
    return None if path.name == f"iteration-{held}" else f"it holds iteration {held}; it was renamed or copied"


def _saved(folder: Path) -> dict[int, Path]:
    """Iteration -> checkpoint folder, the oldest first."""
    matches = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in folder.glob("iteration-*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _remove_others(folder: Path, checkpoint: Checkpoint, keep: int, best_window: int | None, also: Collection[int]) -> None:
    """Removes what is no longer kept, and later checkpoints: the run would have resumed from them if they were undamaged."""
    saved = _saved(folder)
    past = [n for n in saved if n <= checkpoint.iteration]
    kept: set[int | None] = {*past[-keep:], *also}
    if best_window is not None:
        kept.add(best_iteration(past, checkpoint.metrics, best_window))
    for n, path in saved.items():
        if n not in kept:
            with suppress(OSError):
                path.rename(folder / f".{path.name}.{token_hex(4)}.removed")  # gone at once, not file by file
    for rest in folder.glob(".iteration-*"):
        shutil.rmtree(rest, ignore_errors=True)
