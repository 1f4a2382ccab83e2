"""Plain loss functions as other libraries have them, sound and with the classic faults, each of which a check finds."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import UserError
from alignbench.authoring.checking import run_checks, subject_of
from alignbench.authoring.plain_loss import CHECKS, PlainLoss, function_named
from alignbench.config.run_config import load_config

HERE = "tests.alignbench.authoring.test_plain_loss"


def sound(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float = 1e-4) -> Tensor:
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


def sound_with_kl(
    logps: Tensor, old_logps: Tensor, adv: Tensor, ref_per_token_logps: Tensor, cliprange: float = 0.2, beta: float = 0.1
) -> Tensor:
    """The k3 estimate of the KL divergence to the reference."""
    change = ref_per_token_logps - logps
    return sound(logps, old_logps, adv, cliprange) + beta * (torch.exp(change) - change - 1).mean()


def of_rewards(log_probs: Tensor, old_log_probs: Tensor, rewards: Tensor) -> Tensor:
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    return sound(log_probs, old_log_probs, advantages, 0.2)


def with_a_tuple(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor, eps: float) -> Any:
    ratio = torch.exp(log_prob - old_log_prob)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps))
    return (losses * response_mask).sum() / response_mask.sum(), {"ratio": ratio.mean()}


def kl_without_gradient(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor) -> Tensor:
    with torch.no_grad():
        penalty = 0.1 * kl.mean()
    return sound(log_prob, old_log_prob, advantages) + penalty


def kl_left_out(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor, beta: float = 0.0) -> Tensor:
    return sound(log_prob, old_log_prob, advantages) + beta * kl.mean()


def old_is_new(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages * torch.exp(log_prob - log_prob)).mean()


def always_on_policy(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages * torch.exp(log_prob - log_prob.detach())).mean()


def wrong_sign(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    return (advantages * torch.exp(log_prob - old_log_prob)).mean()


def summed_over_steps(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages * torch.exp(log_prob - old_log_prob)).sum(1).mean()


def clipped_by_minimum(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The smaller of two losses: what is wrong is clipped, and what is right is not."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def wrapped(name: str, **given: Any) -> PlainLoss:
    function = function_named(f"{HERE}:{name}")
    assert function is not None
    return PlainLoss(name, function, given)


@pytest.mark.parametrize("name", ["sound", "sound_with_kl", "of_rewards", "with_a_tuple"])
def test_a_sound_loss_fails_no_trial(name: str) -> None:
    found = {check: trial(wrapped(name))[0] for check, trial in CHECKS.items()}
    assert found["first gradient"]
    assert found["importance ratio"]
    assert False not in found.values()


@pytest.mark.parametrize(
    ("name", "check", "says"),
    [
        ("kl_without_gradient", "KL penalty", "the KL penalty changes the loss and has no gradient"),
        ("kl_left_out", "KL penalty", "the KL penalty has no effect; is its weight 0?"),
        ("old_is_new", "first gradient", "is zero: the ratio has none, or is detached"),
        ("always_on_policy", "importance ratio", "does not depend on the old log-probabilities"),
        ("wrong_sign", "first gradient", "their cosine is -1.000"),
        ("summed_over_steps", "first gradient", "with twice the steps the gradient is 2 times that of a mean over steps"),
        ("clipped_by_minimum", "clip", "a ratio beyond the clip still has a gradient"),
    ],
)
def test_each_classic_fault_is_found_by_the_trial_of_its_kind(name: str, check: str, says: str) -> None:
    holds, detail = CHECKS[check](wrapped(name))
    assert holds is False
    assert says in detail


def test_a_loss_that_leaves_detaching_to_its_caller_is_told_so_and_does_not_fail() -> None:
    holds, detail = CHECKS["gradient to nothing else"](wrapped("sound"))
    assert holds is None
    assert detail == "old_log_prob, advantages would get a gradient if the caller did not detach them"


def test_an_argument_that_is_not_known_is_refused_with_what_to_do() -> None:
    def strange(log_prob: Tensor, advantages: Tensor, temperature: float) -> Tensor:
        return log_prob.sum() * temperature

    with pytest.raises(UserError, match="the argument 'temperature' is not known; give it a value with --set objective"):
        PlainLoss("strange", strange, {})
    assert PlainLoss("strange", strange, {"temperature": 2.0}).numbers == {"temperature": 2.0}
    with pytest.raises(UserError, match="the function has no argument 'temprature'; it has log_prob, advantages, temperature"):
        PlainLoss("strange", strange, {"temprature": 2.0})
    with pytest.raises(UserError, match="takes the new log-probabilities"):
        PlainLoss("strange", lambda log_prob: log_prob, {})


@pytest.mark.parametrize("name", ["sound_with_kl", "of_rewards"])
def test_a_plain_loss_passes_all_checks_of_an_objective(name: str) -> None:
    options = {"objective": f"{HERE}:{name}", "sampler": "independent", "backbone": "gaussian_mixture"}
    results = {result.name: result for result in run_checks(subject_of(load_config(options=options)), iterations=20, lr=3e-2)}
    assert not any(result.failed for result in results.values()), json.dumps([r.model_dump() for r in results.values()])
    assert set(CHECKS) <= set(results)
    assert results["learning"].holds
    assert results["first ratio is 1"].holds


def test_a_plain_loss_with_a_fault_fails_the_checks_of_an_objective() -> None:
    options = {"objective": f"{HERE}:wrong_sign", "sampler": "independent", "backbone": "gaussian_mixture"}
    results = run_checks(subject_of(load_config(options=options)), iterations=20, lr=3e-2)
    assert {result.name for result in results if result.failed} == {"first gradient", "learning"}


def test_a_plain_loss_of_final_images_is_checked_too() -> None:
    options = {"objective": f"{HERE}:sound", "sampler": "independent", "backbone": "gaussian_mixture", "likelihood": "elbo"}
    results = list(run_checks(subject_of(load_config(options=options)), iterations=0))
    assert not any(result.failed for result in results)
    assert next(r for r in results if r.name == "replay rows").detail.startswith("the objective has 72 rows of its own")
