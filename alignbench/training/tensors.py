"""The tensors that a training changes, and the files of a checkpoint that hold them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignbench.backbone import temporarily_set
from alignbench.errors import UserError
from alignbench.objective import Objective
from alignbench.runtime.processes import full_tensor, shard_like

WEIGHTS, AVERAGE, REFERENCE, BEHAVIOUR, OWN, OPTIMIZER = (
    f"{name}.safetensors" for name in ("weights", "ema", "reference", "old", "objective", "optimizer")
)


class EMA:
    """The exponential moving average of parameters.

    After optimizer step n, if n is a multiple of `every`, the average moves towards the parameters with the decay
    min((1 + n) / (10 + n), decay), so that it leaves the initial weights soon.

    Attributes:
        average: the averages, one for each parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, every: int) -> None:
        self.parameters, self.decay, self.every = parameters, decay, every
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average after optimizer step number `step`, counted from 1."""
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
        optimizer: of these parameters and the objective's own.
        ema: the moving average of the policy's parameters; None where the run keeps none.
        objective: its parameters are trained too.
        reference: the policy's parameters in a reference that has been refreshed; None while it is the base model.
        behaviour: the same in a behaviour policy that is a moving average; None for an objective that needs no such policy.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    objective: Objective
    reference: list[Tensor] | None = None
    behaviour: list[Tensor] | None = None

    def by_file(self) -> dict[str, dict[str, Tensor]]:
        """File name -> name -> tensor, unsharded and contiguous; files without a tensor are left out."""
        lists: dict[str, Sequence[Tensor]] = {
            AVERAGE: self.ema.average if self.ema else [],
            REFERENCE: self.reference or [],
            BEHAVIOUR: self.behaviour or [],
            OWN: [*self.objective.parameters()],
        }
        tensors = {WEIGHTS: _trained(self.model), OPTIMIZER: _optimizer_tensors(self.optimizer)}
        return tensors | {name: {str(i): _saved_form(v) for i, v in enumerate(vs)} for name, vs in lists.items() if vs}

    def load(self, path: Path, iteration: int) -> None:
        """Copies the tensors of an undamaged checkpoint into the model, the optimizer and what follows them.

        Raises:
            UserError: the checkpoint belongs to another model.
        """
        weights = PolicyWeights("raw", iteration, load_file(path / WEIGHTS)).in_order(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        _copy(trained, weights)
        if self.ema:
            _copy(self.ema.average, load_list(path / AVERAGE))
        own = list(self.objective.parameters())
        if own:
            _copy(own, load_list(path / OWN))

        def optional(name: str) -> list[Tensor] | None:
            values = load_list(path / name) if (path / name).exists() else None
            return values and [shard_like(value.to(p.device), p) for value, p in zip(values, trained, strict=True)]

        self.reference, self.behaviour = optional(REFERENCE), optional(BEHAVIOUR)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = _optimizer_state(load_file(path / OPTIMIZER), parameters)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


@dataclass(frozen=True)
class PolicyWeights:
    """The policy's weights in a checkpoint, as an evaluation takes them.

    Attributes:
        kind: `ema` where the run keeps a moving average, else `raw`.
        iteration: of the checkpoint.
        values: by parameter name for `raw`, in the order of the policy's parameters for `ema`.
    """

    kind: Literal["raw", "ema"]
    iteration: int
    values: dict[str, Tensor] | list[Tensor]

    def in_order(self, model: nn.Module) -> list[Tensor]:
        """The values in the order of the model's trained parameters, on their devices and in their dtypes.

        Raises:
            UserError: the weights belong to another model.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        values = self.values
        if isinstance(values, dict):
            values = [values[name] for name in trained if name in values] if len(values) == len(trained) else []
        same = len(values) == len(trained) and all(v.shape == p.shape for v, p in zip(values, trained.values(), strict=True))
        if not same:
            raise UserError("the checkpoint's weights belong to another model than the one that the run's configuration names")
        return [v.to(p.device, p.dtype) for v, p in zip(values, trained.values(), strict=True)]


def load_list(path: Path) -> list[Tensor]:
    """The tensors of a file whose names are 0, 1, 2 and so on, in this order."""
    saved = load_file(path)
    return [saved[str(i)] for i in range(len(saved))]


@torch.no_grad()
def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(shard_like(value.to(tensor.device), tensor))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, as they are saved."""
    return {name: _saved_form(p) for name, p in model.named_parameters() if p.requires_grad}


def _saved_form(tensor: Tensor) -> Tensor:
    return full_tensor(tensor.detach()).contiguous()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, `parameter number.name` -> tensor; its settings come from the configuration."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": _saved_form(value) for i, entry in state.items() for name, value in entry.items()}


def _optimizer_state(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `_optimizer_tensors`, with tensors that are sharded as the parameters are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        is_moment = value.shape == parameter.shape  # the other entry is the count of steps
        state.setdefault(int(number), {})[name] = shard_like(value.to(parameter.device), parameter) if is_moment else value
    return state
