"""Between base and trained model: its ends to the bit, and cases that are exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import UserError, flow, load_backbone
from alignbench.backbone import Backbone
from alignbench.backbones.gaussian_mixture import GaussianMixture, Residual
from alignbench.backbones.mixture.mixtures import mixture_velocity
from alignbench.inference.interpolation import mixed_velocity, mixed_weights
from alignbench.rollouts.executor import sample
from tests.support.toys import PROMPTS, KnownFlow, ToyBackbone


def trained() -> ToyBackbone:
    policy = ToyBackbone()
    policy.nudge(0.2)
    return policy


def drawn(policy: Backbone) -> Tensor:
    return sample(policy, PROMPTS, 2, 4, 0)


def test_weight_0_is_the_base_and_weight_1_the_trained_model_to_the_bit() -> None:
    policy = trained()
    with policy.reference():
        base = drawn(policy)
    assert torch.equal(drawn(mixed_velocity(policy, 0.0)), base)
    assert torch.equal(drawn(mixed_velocity(policy, 1.0)), drawn(policy))
    assert not torch.equal(drawn(policy), base)


@pytest.mark.parametrize("weight", [-0.5, 0.5, 2.0])
def test_velocities_are_mixed_by_the_weight(weight: float) -> None:
    policy = trained()
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.full((3,), 0.4), policy.encode(PROMPTS), torch.tensor([0, 1, 1]))
    with policy.reference():
        base = policy.velocity(*inputs)
    expected = (1 - weight) * base + weight * policy.velocity(*inputs)
    assert torch.allclose(mixed_velocity(policy, weight).velocity(*inputs), expected, atol=1e-6)


def test_inside_its_reference_the_mixed_model_is_the_base_and_afterwards_it_is_not() -> None:
    policy = trained()
    mixed = mixed_velocity(policy, 2.0)
    before = drawn(mixed)
    with policy.reference():
        base = drawn(policy)
    with mixed.reference():
        assert torch.equal(drawn(mixed), base)
    assert torch.equal(drawn(mixed), before)
    assert not torch.equal(before, base)


class Normal(KnownFlow):
    """The flow of N(mean, 1) in one dimension; its base model is that of N(0, 1)."""

    latent_shape = (1,)
    default_steps = 20

    def __init__(self, mean: float) -> None:
        self.mean = self.active = mean

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any, group: Tensor) -> Tensor:
        ones = torch.ones(len(x), 1)
        return mixture_velocity(x, sigma, ones, self.active * ones[..., None], ones)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = 0.0
        try:
            yield
        finally:
            self.active = self.mean


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_with_a_linear_reward_the_weight_divides_the_kl_coefficient(weight: float) -> None:
    # N(0, 1) with reward a x and KL coefficient b has the target N(a / b, 1), so b / w gives N(w a / b, 1).
    found, other = (sample(model, ["a"], 50, 20, 0) for model in (mixed_velocity(Normal(0.8), weight), Normal(0.8 * weight)))
    assert torch.allclose(found, other, atol=1e-5)


def mixture() -> GaussianMixture:
    torch.manual_seed(0)
    policy = load_backbone("gaussian_mixture", device="cpu", quadrature=10)
    assert isinstance(policy, GaussianMixture)
    assert isinstance(policy.residual, Residual)
    with torch.no_grad():
        for parameter in policy.residual.net[-1].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return policy


def test_where_the_base_is_a_zero_output_layer_mixed_weights_are_mixed_velocities() -> None:
    policy, prompts = mixture(), ["rare_mode 0"]
    before = [p.detach().clone() for p in policy.parameters()]
    with mixed_weights(policy, 1.7):
        by_weights = sample(policy, prompts, 20, 8, 0)
    assert torch.allclose(by_weights, sample(mixed_velocity(policy, 1.7), prompts, 20, 8, 0), atol=1e-4)
    assert all(map(torch.equal, before, policy.parameters()))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_of_mixed_weights_to_the_bit(weight: float) -> None:
    policy, prompts = mixture(), ["rare_mode 0"]
    with policy.reference():
        base = sample(policy, prompts, 5, 4, 0)
    expected = base if weight == 0 else sample(policy, prompts, 5, 4, 0)
    with mixed_weights(policy, weight):
        assert torch.equal(sample(policy, prompts, 5, 4, 0), expected)


def test_what_the_mixture_measures_of_itself_is_that_of_the_mixed_velocity() -> None:
    policy, prompts = mixture(), ["rare_mode 0"]
    with policy.reference():
        base = policy.measure(prompts)["exact_reward"].values[0]
    found = {}
    for weight in (0.0, 0.5, 1.0):
        mixed = mixed_velocity(policy, weight)
        assert isinstance(mixed, GaussianMixture)
        found[weight] = mixed.measure(prompts)["exact_reward"].values[0]
    assert (found[0.0], found[1.0]) == (base, policy.measure(prompts)["exact_reward"].values[0])
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_diffusers_folder_mixes_the_output_of_a_lora_or_all_weights(train: str) -> None:
    policy = load_backbone("tiny", device="cpu", train=train)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inside: dict[float, list[Tensor]] = {w: policy.mixed_weights(w) for w in (0.0, 0.5, 1.0)}
    values = [p.detach() for p in policy.parameters()]
    assert all(map(torch.equal, inside[1.0], values))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.full((2,), 0.4), policy.encode(["a red circle"]), torch.zeros(2, dtype=torch.long))
    found = {}
    with torch.no_grad():
        for weight in (0.0, 0.001, 0.002):
            with mixed_weights(policy, weight):
                found[weight] = policy.velocity(*inputs)
        with policy.reference():
            assert torch.equal(found[0.0], policy.velocity(*inputs))
    # Near the base model the velocity is linear in the weight.
    one, two = found[0.001] - found[0.0], found[0.002] - found[0.0]
    assert float((two - 2 * one).norm()) < 0.05 * float(two.norm())
    if train == "lora":
        halved = [torch.equal(h, v / 2) for h, v in zip(inside[0.5], values, strict=True)]
        assert sum(halved) == len(values) // 2  # those behind the LoRA's input layers


def test_a_backbone_that_cannot_mix_weights_says_what_to_do() -> None:
    with pytest.raises(UserError, match="cannot mix the weights of base and trained model; mix velocities instead"):
        mixed_weights(ToyBackbone(), 0.5)
