"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder `iteration-N` that is there whole or not at all: tensors as safetensors, the rest in `state.json`, and
the SHA-256 of each file in `SHA256SUMS`, which `sha256sum -c` reads. Noise, plans, the order of prompts and what the global
generators give are functions of the seed and the iteration, so that no generator's state has to be kept.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignbench import tasks
from alignbench.backbone import Backbone, temporarily_set
from alignbench.config.run_config import WITHOUT_EFFECT
from alignbench.errors import UserError
from alignbench.files.opening import sha256_of
from alignbench.files.writing import is_litter, write_folder
from alignbench.objective import Objective
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, full_tensor, shard_like

VERSION = 4
REPLACEABLE = ("reward", "judges")
"""Parts of a task that a run may go on with others of: a scorer that died is replaced. Another reward is told in the record."""
STATE, SUMS = "state.json", "SHA256SUMS"
WEIGHTS, AVERAGE, REFERENCE, BEHAVIOUR, OWN, OPTIMIZER = (
    f"{name}.safetensors" for name in ("weights", "ema", "reference", "old", "objective", "optimizer")
)


class Checkpoint(BaseModel):
    """`state.json`: where the run stands and what it has measured."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    version: int = VERSION
    iteration: int
    config: dict[str, Any]
    task: dict[str, str] = {}
    """The fingerprint of the task (see `tasks.Task.fingerprint`) and of the fixed pairs; empty in checkpoints that lack it."""
    changes: list[str] = []
    """A sentence for each time that the run went on with another reward."""
    budget: dict[str, Any]
    metrics: list[dict[str, Any]]
    objective: dict[str, Any] = {}
    """What the objective remembers of earlier rollouts."""
    sampler: dict[str, Any] = {}
    """What the sampler remembers of them."""
    ratio_deviation: float
    started: str
    reference_since: int = 0
    """How many iterations were done when the reference was last refreshed."""
    micro_batch: int | None = None
    """Rows in one model call, after memory ran out as often as the next number says."""
    micro_batch_halvings: int = 0


class EMA:
    """Moving average of parameters: decay min((1 + n) / (10 + n), decay), every `every` updates."""

    def __init__(self, parameters: list[nn.Parameter], decay: float, every: int) -> None:
        self.parameters, self.decay, self.every = parameters, decay, every
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after optimizer step number `step`, counted from 1."""
        if step % self.every == 0:
            decay = min((1 + step) / (10 + step), self.decay)
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While entered, the parameters hold their averages; afterwards the live values are back."""
        with temporarily_set(self.parameters, self.average):
            yield


@dataclass
class TrainedTensors:
    """Every tensor that a training changes, and so every tensor of a checkpoint.

    Attributes:
        model: the module whose parameters with `requires_grad` are the policy.
        ema: their moving average, if the run keeps one.
        objective: with its own parameters and its state.
        reference: the parameters of a reference that has been refreshed; None while it is the base model.
        behaviour: those of a behaviour policy that is an average, for an objective that wants one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    objective: Objective
    reference: list[Tensor] | None = None
    behaviour: list[Tensor] | None = None

    def by_file(self) -> dict[str, dict[str, Tensor]]:
        """File name -> name -> tensor, whole and contiguous; files without a tensor are left out."""
        lists: dict[str, Sequence[Tensor]] = {
            AVERAGE: self.ema.average if self.ema else [],
            REFERENCE: self.reference or [],
            BEHAVIOUR: self.behaviour or [],
            OWN: [*self.objective.parameters()],
        }
        tensors = {WEIGHTS: _trained(self.model), OPTIMIZER: _optimizer_tensors(self.optimizer)}
        return tensors | {name: {str(i): _saved_form(v) for i, v in enumerate(vs)} for name, vs in lists.items() if vs}

    def load(self, path: Path, iteration: int) -> None:
        """Takes the tensors of a whole checkpoint.

        Raises:
            UserError: it is of another model.
        """
        weights = PolicyWeights("raw", iteration, load_file(path / WEIGHTS)).in_order(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        _copy(trained, weights)
        if self.ema:
            _copy(self.ema.average, _load_list(path / AVERAGE))
        own = list(self.objective.parameters())
        if own:
            _copy(own, _load_list(path / OWN))

        def optional(name: str) -> list[Tensor] | None:
            values = _load_list(path / name) if (path / name).exists() else None
            return values and [shard_like(value.to(p.device), p) for value, p in zip(values, trained, strict=True)]

        self.reference, self.behaviour = optional(REFERENCE), optional(BEHAVIOUR)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = _optimizer_state(load_file(path / OPTIMIZER), parameters)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    trained: TrainedTensors,
    *,
    keep: int = 1,
    best_window: int | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Path:
    """Writes `folder/iteration-N`, whole or not at all, and removes those that are not kept; returns its path.

    One of the same iteration that is whole stays as it is.

    Args:
        keep: how many of the newest are kept.
        best_window: the best is kept as well, see `best_iteration`; None for none.
        processes: that hold the tensors together; the first one writes.

    Raises:
        DiskError: it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"iteration-{checkpoint.iteration}"
    tensors = trained.by_file()

    def write(partial: Path) -> None:
        for name, of_file in tensors.items():
            save_file(of_file, partial / name)
        (partial / STATE).write_text(checkpoint.model_dump_json(), encoding="utf-8")
        sums = _sums({file.name: sha256_of(file) for file in partial.iterdir()})
        (partial / SUMS).write_text(sums, encoding="utf-8")

    def place() -> None:
        if _fault(final):
            write_folder(final, write)
        _remove_others(folder, checkpoint, keep, best_window)

    processes.on_rank_zero(place)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether a run that was interrupted has anything to go on from."""
    return bool(_saved(folder))


def best_iteration(iterations: Iterable[int], metrics: Sequence[Mapping[str, Any]], window: int) -> int | None:
    """The iteration whose checkpoint has the highest training reward, averaged over the `window` iterations before it.

    The newest of equals; None where none has so many behind it. The reward is that of rollouts on training prompts: it costs
    nothing, and leaves the evaluation prompts unseen. If these chose what they judge, the chosen model's score would be the
    maximum of several noisy ones, and too high. For the same reason a run's record is about its last weights, never its best.

    Args:
        metrics: a row an iteration, from the first on.
    """
    scores = {}
    for n in iterations:
        known = [row["reward"] for row in metrics[max(n - window, 0) : n] if not math.isnan(row["reward"])]
        if n >= window and known:
            scores[n] = sum(known) / len(known)
    return max(scores, key=lambda n: (scores[n], n)) if scores else None


@dataclass(frozen=True)
class PolicyWeights:
    """The weights that a checkpoint's model is judged with: `ema` where the run keeps an average, else `raw`."""

    kind: Literal["raw", "ema"]
    iteration: int
    values: dict[str, Tensor] | list[Tensor]
    """By name (raw), or in the order of the policy's parameters (ema)."""

    def in_order(self, model: nn.Module) -> list[Tensor]:
        """One for each parameter of the model that is trained.

        Raises:
            UserError: they are of another model.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        values = self.values
        if isinstance(values, dict):
            values = [values[name] for name in trained if name in values] if len(values) == len(trained) else []
        same = len(values) == len(trained) and all(v.shape == p.shape for v, p in zip(values, trained.values(), strict=True))
        if not same:
            raise UserError("the checkpoint's weights are of another model than the run's configuration names")
        return [v.to(p.device, p.dtype) for v, p in zip(values, trained.values(), strict=True)]


def policy_weights(folder: Path, best_window: int | None = None) -> PolicyWeights:
    """The weights alone, for judging and exporting: of the newest checkpoint, or of the best, see `best_iteration`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    saved = _saved(folder)
    if not saved:
        raise UserError(f"{folder.parent} has no checkpoint")
    chosen = max(saved)
    if best_window is not None:
        best = best_iteration(saved, _read_state(saved[chosen]).metrics, best_window)
        if best is None:
            raise UserError(f"no checkpoint of {folder.parent} has best_window={best_window} iterations behind it")
        chosen = best
    path = saved[chosen]
    _read_state(path)
    if (path / AVERAGE).exists():
        return PolicyWeights("ema", chosen, _load_list(path / AVERAGE))
    return PolicyWeights("raw", chosen, load_file(path / WEIGHTS))


@dataclass(frozen=True)
class Restored:
    """What `load_checkpoint` found beside the tensors.

    Attributes:
        checkpoint: the state.
        passed_over: a sentence for each newer checkpoint that is damaged.
    """

    checkpoint: Checkpoint
    passed_over: list[str]


def judged_weights(policy: Backbone, weights: PolicyWeights | None) -> AbstractContextManager[None]:
    """While entered, the policy has these weights; without any it is the base model."""
    if weights is None:
        return policy.reference()
    return temporarily_set(list(policy.parameters()), weights.in_order(policy.trainable()))


def load_checkpoint(
    folder: Path,
    config: dict[str, Any],
    trained: TrainedTensors,
    task: Mapping[str, str] | None = None,
) -> Restored:
    """Restores the newest checkpoint in `folder` that is as it was written into the given tensors.

    A damaged one is passed over: from an older one the run comes to the same place again.

    Args:
        task: the fingerprint of what the run trains on now; None to let it be.

    Raises:
        UserError: there is none, all are damaged, or it is of another version or model, or was made with other settings,
            prompts or pairs.
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
    changed = sorted(k for k in config if k not in WITHOUT_EFFECT and _differs(config[k], checkpoint.config.get(k)))
    if changed:
        raise UserError(f"{path} was made with other settings ({', '.join(changed)}); resume with the same ones")
    parts = tasks.changed_parts(task or {}, checkpoint.task)
    tasks.refuse_changed([part for part in parts if part not in REPLACEABLE], f"the checkpoint {path}")
    at = f"changed after iteration {checkpoint.iteration}: what was trained until then had another one"
    checkpoint.changes += [f"the {part} {at}" for part in parts if part == "reward"]
    trained.load(path, checkpoint.iteration)
    trained.objective.load_state(checkpoint.objective)
    return Restored(checkpoint, passed_over)


def _differs(now: Any, then: Any) -> bool:
    """Whether a setting changed; keys of `evaluation` and its like that an older version did not know count for nothing."""
    if isinstance(now, dict) and isinstance(then, dict) and "name" not in now:
        return any(_differs(value, then[key]) for key, value in now.items() if key in then) or bool({*then} - {*now})
    return bool(now != then)


class DamagedCheckpointError(UserError):
    """A checkpoint's files are not those that were written."""


def _read_state(path: Path) -> Checkpoint:
    """The state of a checkpoint whose files are all as they were written.

    Raises:
        UserError: it is of another version.
        DamagedCheckpointError: it is not as it was written.
    """
    fault = _fault(path)
    if fault:
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {fault}")
    data = _state(path)
    if data.get("version") != VERSION:
        raise UserError(f"{path} has checkpoint version {data.get('version')}; this alignbench reads {VERSION}")
    return Checkpoint.model_validate(data)


def _state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`; raises DamagedCheckpointError where it is not JSON with keys and values."""
    try:
        data = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {STATE} is not what was written")
    return data


def _fault(path: Path) -> str | None:
    """How a checkpoint differs from what was written; None where it does not."""
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
    if sums != _sums(listed):
        return f"{SUMS} is not what was written"
    try:
        held = _state(path).get("iteration")
    except DamagedCheckpointError:
        return f"{STATE} is not what was written"
    return None if path.name == f"iteration-{held}" else f"it holds iteration {held}; it was renamed or copied"


def _sums(digests: Mapping[str, str]) -> str:
    """The content of `SHA256SUMS`, from file name -> digest."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def _saved(folder: Path) -> dict[int, Path]:
    """Iteration -> checkpoint, from the oldest on."""
    found = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in folder.glob("iteration-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _remove_others(folder: Path, checkpoint: Checkpoint, keep: int, best_window: int | None) -> None:
    """Later ones go as well: the run would have gone on from there if they were whole."""
    saved = _saved(folder)
    past = [n for n in saved if n <= checkpoint.iteration]
    kept: set[int | None] = {*past[-keep:]}
    if best_window is not None:
        kept.add(best_iteration(past, checkpoint.metrics, best_window))
    for n, path in saved.items():
        if n not in kept:
            with suppress(OSError):
                path.rename(folder / f".{path.name}.{token_hex(4)}.removed")  # gone at once, not file by file
    for rest in folder.glob(".iteration-*"):
        shutil.rmtree(rest, ignore_errors=True)


def _load_list(path: Path) -> list[Tensor]:
    saved = load_file(path)
    return [saved[str(i)] for i in range(len(saved))]


@torch.no_grad()
def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(shard_like(value.to(tensor.device), tensor))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: _saved_form(p) for name, p in model.named_parameters() if p.requires_grad}


def _saved_form(tensor: Tensor) -> Tensor:
    return full_tensor(tensor.detach()).contiguous()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, `parameter.name` -> tensor; its settings are those of the configuration."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": _saved_form(value) for i, of_one in state.items() for name, value in of_one.items()}


def _optimizer_state(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """What `_optimizer_tensors` gave, spread as the parameters are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        of_shape = value.shape == parameter.shape  # not so the count of steps
        state.setdefault(int(number), {})[name] = shard_like(value.to(parameter.device), parameter) if of_shape else value
    return state
