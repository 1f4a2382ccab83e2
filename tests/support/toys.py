"""A backbone of a few hundred parameters, small plans, and forests made by hand (`hand_made_forest`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignbench.backbone import Backbone
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_torch
from alignbench.rollouts.plan import Plan, Step
from alignbench.testing import hand_made_forest as hand_made_forest

LATENT = (2, 3, 3)
CONDITION = 4
PROMPTS = ["a red circle", "two blue squares"]


class ToyNet(nn.Module):
    """velocity(x, sigma, condition): one hidden layer of tanh."""

    def __init__(self, latent: int, hidden: int = 12) -> None:
        super().__init__()
        self.inner = nn.Linear(latent + 1 + CONDITION, hidden)
        self.outer = nn.Linear(hidden, latent)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        row = torch.cat([x.flatten(1), sigma[:, None], condition], dim=1)
        answer: Tensor = self.outer(torch.tanh(self.inner(row)))
        return answer.view(x.shape)


class ToyBackbone(Backbone):
    """Deterministic float32 model on the CPU that counts its calls and rows.

    Attributes:
        calls, rows: how often `velocity` was called, and for how many rows in all, by policy and reference together.
    """

    name = "toy"
    latent_shape = LATENT
    device = torch.device("cpu")
    dtype = torch.float32
    default_steps = 6

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            self.net = ToyNet(int(np.prod(LATENT)))
        self.frozen = deepcopy(self.net).requires_grad_(False)
        self.active = self.net
        self.calls = 0
        self.rows = 0

    def sigmas(self, steps: int) -> Tensor:
        t = torch.linspace(1, 0, steps + 1)
        return 2 * t / (1 + t)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        digests = [sha256(prompt.encode()).digest()[:CONDITION] for prompt in prompts]
        return torch.tensor([list(d) for d in digests], dtype=torch.float32) / 128 - 1

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        assert x.shape[1:] == LATENT
        assert sigma.shape == group.shape == (len(x),)
        self.calls += 1
        self.rows += len(x)
        answer: Tensor = self.active(x, sigma, conditioning[group])
        return answer

    def decode(self, latents: Tensor) -> np.ndarray:
        pictures = torch.cat([latents, latents[:, :1]], dim=1).permute(0, 2, 3, 1)
        return (pictures.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy()

    def trainable(self) -> nn.Module:
        return self.net

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = self.frozen
        try:
            yield
        finally:
            self.active = self.net

    def nudge(self, size: float, seed: int = 1) -> None:
        """Moves every parameter of the policy a little, as some updates would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    def reset_counters(self) -> None:
        self.calls = self.rows = 0

    def gradient(self) -> Tensor:
        """Returns all gradients as one vector."""
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])


class KnownFlow(Backbone):
    """A flow in closed form: nothing to train, no images, and a reference that is the policy. Derive and give its velocity."""

    device = torch.device("cpu")
    dtype = torch.float32

    def encode(self, prompts: Sequence[str]) -> Any:
        return None

    def decode(self, latents: Tensor) -> np.ndarray:
        raise NotImplementedError

    def trainable(self) -> nn.Module:
        return nn.Module()

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield


def tree(steps: int, splits: Sequence[int], children: int = 3, rule: str = "cps", eta: float = 0.7) -> Plan:
    """Makes a plan with one root that splits at the given steps and is deterministic elsewhere."""
    split = Step(rule, eta, children)  # type: ignore[arg-type]
    return Plan(tuple(split if t in splits else Step() for t in range(steps)))


def two_groups_of_three(policy: ToyBackbone, rewards: Sequence[float]) -> RolloutForest:
    """Makes a forest of independent rollouts of the prompts a and b, three each over three steps, with six rewards."""
    forest = rollout(policy, ["a", "b"], chains(3, 3), seed=0)
    forest.rewards = torch.tensor(rewards)
    return forest


def chains(steps: int, roots: int, rule: str = "cps", eta: float = 0.7) -> Plan:
    """Makes a plan of independent rollouts, stochastic at all steps but the last."""
    stochastic = Step(rule, eta)  # type: ignore[arg-type]
    return Plan((*[stochastic] * (steps - 1), Step()), roots=roots)


MIXED = Plan((Step("sde", 0.7, 2), Step(), Step("cps", 0.5), Step("dance", 0.4, 3), Step()))
"""Every rule, starting at sigma = 1, with a stochastic step that follows another and one that follows an ODE step."""
