"""The optimizer Muon in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024), in float32, for all matrices of one shape at a time.

    `torch.optim.Muon` computes the same in bfloat16, which is several times slower on CPUs without bfloat16 arithmetic.
    Updates are scaled to AdamW's usual size, 0.2 sqrt(max(m, n)), so that AdamW's learning rates and weight decay apply.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, _orthogonal(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The closest orthogonal matrices, [N, m, n], by five quintic Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def muon_and_adamw(
    matrices: list[nn.Parameter], parameters: Iterable[nn.Parameter], *, muon_lr: float, lr: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Makes Muon for the matrices of a transformer's blocks, and AdamW for all other parameters of the model."""
    inside = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in inside]
    return Muon(matrices, lr=muon_lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
