"""Between base and trained model, and beyond the trained one: v = v_base + w (v_trained - v_base).

With w = 0 the base model is evaluated and with w = 1 the trained one, each alone and to the bit. Reinforcement Learning
Guidance (arXiv 2508.21016) mixes velocities: to first order its images are those of a training with the KL coefficient divided
by w. Mixing weights costs no second model evaluation.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from alignbench.backbone import Backbone, temporarily_set


class _Mix:
    """The velocity and the reference of an interpolated model."""

    def __init__(self, policy: Backbone, weight: float) -> None:
        self.policy, self.weight, self.in_reference = policy, weight, False

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any, group: Tensor) -> Tensor:
        if self.in_reference or self.weight == 1:
            return self.policy.velocity(x, sigma, conditioning, group)
        with self.policy.reference():
            base = self.policy.velocity(x, sigma, conditioning, group)
        if self.weight == 0:
            return base
        return base + self.weight * (self.policy.velocity(x, sigma, conditioning, group) - base)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self.policy.reference():
            self.in_reference = True
            try:
                yield
            finally:
                self.in_reference = False


def mixed_velocity(policy: Backbone, weight: float) -> Backbone:
    """The model whose velocity is that of the base model plus `weight` times the difference of the policy's from it.

    It shares the weights of the policy, which must not be inside `reference()`.
    """
    mixed, mix = copy.copy(policy), _Mix(policy, weight)
    # A copy has the other methods of its backbone, such as exact measurements, which then read the mixed velocity.
    vars(mixed).update(velocity=mix.velocity, reference=mix.reference, unscored=policy.unscored)
    return mixed


def mixed_weights(policy: Backbone, weight: float) -> AbstractContextManager[None]:
    """While entered, the policy has the weights base + `weight` (trained - base); for a LoRA, its output is multiplied.

    Raises:
        UserError: the backbone cannot mix weights.
    """
    if weight == 1:
        return nullcontext()
    if weight == 0:
        return policy.reference()
    return temporarily_set(list(policy.parameters()), policy.mixed_weights(weight))


def rows_of_mixed_velocity(weight: float) -> int:
    """Counts the model evaluations that stand behind one of `mixed_velocity`: one at its two ends, else two."""
    return 1 if weight in (0, 1) else 2
