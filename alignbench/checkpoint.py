"""Checkpoints: everything that a run needs to go on as if it had never stopped.

Weights are safetensors; the optimizer's state is read with `weights_only`; the rest is JSON. The noise, the plans and the
order of prompts are functions of the seed and the iteration, so that no generator's state has to be kept.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignbench.backbone import Backbone, holding
from alignbench.errors import RunError, UserError
from alignbench.objective import Objective

VERSION = 2


class Checkpoint(BaseModel):
    """`state.json`: where the run stands and what it has measured."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    iteration: int
    config: dict[str, Any]
    budget: dict[str, Any]
    metrics: list[dict[str, Any]]
    objective: dict[str, Any] = {}
    """What the objective remembers of earlier rollouts."""
    sampler: dict[str, Any] = {}
    """What the sampler remembers of them."""
    ratio_deviation: float
    started: str


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
        with holding(self.parameters, self.average):
            yield


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    objective: Objective,
    reference: list[Tensor] | None = None,
) -> Path:
    """Writes `folder/iteration-N`, whole or not at all, and removes older ones; returns its path.

    Raises:
        RunError: it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"iteration-{checkpoint.iteration}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_trained(model), partial / "weights.safetensors")
        if ema:
            _save_list(ema.average, partial / "ema.safetensors")
        if reference:
            _save_list(reference, partial / "reference.safetensors")
        own = [p.detach() for p in objective.parameters()]
        if own:
            _save_list(own, partial / "objective.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(checkpoint.model_dump_json(), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"cannot write the checkpoint {final}: {error.strerror or error}") from error
    for old in folder.glob("iteration-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether a run that was interrupted has anything to go on from."""
    return any(folder.glob("iteration-*"))


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
        values = self.values if isinstance(self.values, list) else [self.values.get(name) for name in trained]
        same = len(values) == len(trained) and all(
            v is not None and v.shape == p.shape for v, p in zip(values, trained.values(), strict=True)
        )
        if not same:
            raise UserError("the checkpoint's weights are of another model than the run's configuration names")
        return [v.to(p.device, p.dtype) for v, p in zip(values, trained.values(), strict=True) if v is not None]


def policy_weights(folder: Path) -> PolicyWeights:
    """The newest checkpoint's weights alone, for judging.

    Raises:
        UserError: there is none, or it is damaged.
    """
    newest = _newest(folder)
    iteration = int(newest.name.rpartition("-")[2])
    average = newest / "ema.safetensors"
    try:
        if average.exists():
            return PolicyWeights("ema", iteration, _load_list(average))
        return PolicyWeights("raw", iteration, load_file(newest / "weights.safetensors"))
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"the checkpoint {newest} is damaged ({type(error).__name__}: {error})") from error


def judged_weights(policy: Backbone, weights: PolicyWeights | None) -> AbstractContextManager[None]:
    """While entered, the policy has these weights; without any it is the base model."""
    if weights is None:
        return policy.reference()
    return holding(list(policy.parameters()), weights.in_order(policy.trainable()))


def load_checkpoint(
    folder: Path,
    config: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    objective: Objective,
) -> tuple[Checkpoint, list[Tensor] | None]:
    """Restores the newest checkpoint in `folder` into the given objects.

    Returns:
        The rest of it, and the parameters of a reference that was refreshed, if it was.

    Raises:
        UserError: there is none, it is damaged, of another version, or was made with other settings.
    """
    newest = _newest(folder)
    try:
        data = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise UserError(f"{newest} has checkpoint version {data.get('version')}; this alignbench reads {VERSION}")
        checkpoint = Checkpoint.model_validate(data)
        changed = sorted(k for k in config if config[k] != checkpoint.config.get(k))
        if changed:
            raise UserError(f"{newest} was made with other settings ({', '.join(changed)}); resume with the same ones")
        model.load_state_dict(load_file(newest / "weights.safetensors"), strict=False)
        if ema:
            averages = _load_list(newest / "ema.safetensors")
            ema.average = [saved.to(a.device) for saved, a in zip(averages, ema.average, strict=True)]
        own = list(objective.parameters())
        if own:
            with torch.no_grad():
                for parameter, saved in zip(own, _load_list(newest / "objective.safetensors"), strict=True):
                    parameter.copy_(saved)
        refreshed = newest / "reference.safetensors"
        device = next(model.parameters()).device
        reference = [value.to(device) for value in _load_list(refreshed)] if refreshed.exists() else None
        objective.load_state(checkpoint.objective)
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"the checkpoint {newest} is damaged ({type(error).__name__}: {error}); resume an older one") from error
    return checkpoint, reference


def _newest(folder: Path) -> Path:
    found = sorted(folder.glob("iteration-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not found:
        raise UserError(f"{folder.parent} has no checkpoint")
    return found[-1]


def _save_list(values: list[Tensor], path: Path) -> None:
    save_file({str(i): value.contiguous() for i, value in enumerate(values)}, path)


def _load_list(path: Path) -> list[Tensor]:
    saved = load_file(path)
    return [saved[str(i)] for i in range(len(saved))]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
