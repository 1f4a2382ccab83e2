"""Gradients on trial: an unbiased estimator with known noise passes, and a planted bias is told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, Plan, RolloutForest, Step, UserError, groups, load_objective
from alignbench.backbones.mixture.mixtures import from_images
from alignbench.config.run_config import RunConfig, load_config
from alignbench.diagnosis.gradients import GradientEstimator, Rule, Trial, diagnose_gradients, unit_of, with_leaves
from alignbench.diagnosis.record import GradientDiagnosis, GradientTrial
from alignbench.objective import Divergence
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.terms import Terms, log_ratio
from alignbench.training.run import run
from tests.alignbench.diagnosis.test_exact_gradient import Drift


class Reinforce(Objective):
    """The plain policy gradient of the expected reward, with the group's mean as baseline."""

    def descends(self, forest: RolloutForest) -> Divergence:
        return Divergence("expected reward", reward=1, kl=0)

    def target_reward(self, forest: RolloutForest) -> Tensor:
        return self.reward(forest) - self.reward(forest).mean(1, keepdim=True)

    def reward(self, forest: RolloutForest) -> Tensor:
        return forest.by_group(forest.rewards)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        r = self.reward(forest)
        centred = (r - r.mean(1, keepdim=True)).float()
        return -(centred * forest.path_sum(log_ratio(terms, forest))).mean()


class Straying(Reinforce):
    """Follows the second coordinate as well, which its claim does not mention."""

    def target_reward(self, forest: RolloutForest) -> Tensor:
        return groups.standardise(forest.by_group(forest.rewards), std="none")

    def reward(self, forest: RolloutForest) -> Tensor:
        return super().reward(forest) + forest.by_group(forest.leaf_latents[:, 1].contiguous())


class FirstCoordinate:
    """Rewards an image with the first coordinate of its point."""

    weights = {"first": 1.0}  # noqa: RUF012

    def score(self, images: np.ndarray, prompts: list[str], *, when: str) -> dict[str, np.ndarray]:
        return {"first": from_images(images)[:, 0]}


def of(objective: str, **sampler: object) -> Trial:
    sets = [f"sampler.{key}={value}" for key, value in sampler.items()]
    name = f"tests.alignbench.diagnosis.test_gradients:{objective}" if objective[0].isupper() else objective
    options = {"objective": name, "sampler": "independent", "backbone": "gaussian_mixture", "task": "equal_modes"}
    config = load_config(preset="smoke", options=options, sets=[*sets, "threads=1", "log_prob_reduction=sum"])
    return Trial(config, Rule("memoryless"))


def on_trial(objective: str, leaves: int = 6) -> GradientTrial:
    estimator = GradientEstimator(Drift(), FirstCoordinate(), ["a"])  # type: ignore[arg-type]
    return estimator.result(of(objective, steps=2, group_size=leaves), repetitions=300)


def test_the_policy_gradient_of_a_gaussian_step_has_no_bias_and_known_noise() -> None:
    """s_i has the gradient -eps_i, R_i = (x_i + eps_i) / 2 in the first coordinate, and g = mean (R_i - mean R) eps_i.

    The mean is (1/2, 0) (K - 1) / K. By the variance of a sample covariance of Gaussians, with var R = 1/2, the noise is
    (K - 1) / K^2 (1/2 + 1/4) in the first coordinate and (K - 1) / K^2 (1/2) in the second: |E g|^2 / noise = (K - 1) / 5.
    """
    found = on_trial("Reinforce", leaves=6)
    assert found.divergence == "expected reward"
    assert (found.rule, found.leaves, found.steps) == ("memoryless", 6, 2)
    assert found.model_rows == 6 * 2 + 6
    for estimate, truth in ((found.cosine, 1.0), (found.scale, 5 / 6), (found.snr, 1.0)):
        assert estimate.lower is not None
        assert estimate.upper is not None
        assert estimate.lower <= truth <= estimate.upper
        assert estimate.upper - estimate.lower < 0.4
    assert found.relative_bias.lower == 0.0


def test_a_planted_bias_is_told() -> None:
    """Its mean is (1/2, 1/2) (K - 1) / K, 45 degrees away from the exact gradient (1/2, 0)."""
    found = on_trial("Straying")
    assert found.cosine.value == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert found.relative_bias.value == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert found.relative_bias.lower is not None
    assert found.relative_bias.lower > 0.6
    assert found.scale.value == pytest.approx(5 / 6, abs=0.1)


def test_few_leaves_keep_the_direction_and_log_variance_doubles_the_scale() -> None:
    found = on_trial("vargrad", leaves=12)
    # The loss is a variance, so its gradient is twice that of the divergence; 11 / 12 for the group's own mean, and E[1 / std]
    # of 12 rewards in place of 1 / std, about 1 + 3 / (4 * 12).
    assert found.divergence == "reverse KL"
    assert found.scale.value == pytest.approx(2 * 11 / 12, abs=0.2)
    assert found.cosine.lower is not None
    assert found.cosine.lower > 0.9


def test_an_objective_that_claims_nothing_has_noise_but_no_bias() -> None:
    found = on_trial("dpo")
    assert found.divergence is None
    assert found.cosine.value is None
    assert found.relative_bias.value is None
    assert found.snr.n == 300


def claims(name: str, **settings: object) -> Divergence | None:
    forest = rollout(Drift(), ["a"], Plan((Step("memoryless", 1.0), Step("cps", 0.5), Step()), roots=3), 0)
    return load_objective(name, **settings).descends(forest)


def test_what_objectives_claim_to_descend() -> None:
    assert claims("vargrad", beta=3) == Divergence("reverse KL", 3)
    assert claims("vargrad", beta=3, reference="none") == Divergence("reverse KL", 3, relative_to_base=False)
    assert claims("flowrl", beta=3) == Divergence("reverse KL", 6)  # its residual is per step, of which two are stochastic
    assert claims("tmpo", beta=3, beta_warmup=0) == Divergence("reverse KL", 3, relative_to_base=False)
    assert claims("tmpo", beta=3, beta_warmup=0, advantage="forward_kl") is None
    forward = claims("tmpo", beta=3, beta_warmup=0, advantage="forward_kl", reference="frozen")
    assert forward == Divergence("forward KL", 3, alpha=0)
    assert claims("ftb", beta=3, alpha=0.5, sharpness=0.5) == Divergence("alpha divergence, 0.75", 3, alpha=0.75)
    assert claims("grpo", kl_beta=0.1) == Divergence("expected reward", 1, kl=0.1)
    assert claims("ddpo") == claims("ppo") == Divergence("expected reward", 1, kl=0)
    assert claims("raft", weights="top") is claims("dpo") is claims("nft") is None


def test_the_unit_of_a_reward_is_its_slope() -> None:
    rewards = torch.tensor([1.0, torch.nan, 3.0, 2.0])
    assert unit_of(torch.tensor([-2.0, 0.0, 2.0, 0.0]), rewards) == 2.0
    assert unit_of(torch.zeros(2), torch.ones(2)) == 0.0


def test_group_sizes_are_reached_by_roots() -> None:
    tree = Plan((Step("cps", 0.5, 3), Step()), roots=1)
    assert with_leaves(tree, 12, "fixed_tree").roots == 4
    with pytest.raises(UserError, match="--leaves 8 does not fit sampler fixed_tree: it draws 3 leaves from each root"):
        with_leaves(tree, 8, "fixed_tree")


def test_rules_are_read_with_and_without_their_eta() -> None:
    assert Rule.parse("sde:1.4").settings() == {"rule": "sde", "noise_level": 1.4}
    assert Rule.parse("memoryless").settings() == {"rule": "memoryless"}
    with pytest.raises(UserError, match=r"such as sde:0\.7,cps,memoryless; got 'sde:x'"):
        Rule.parse("sde:x")


def toy(objective: str, sampler: str = "independent", **options: object) -> RunConfig:
    chosen = {"objective": objective, "sampler": sampler, "backbone": "gaussian_mixture", "task": "equal_modes", **options}
    return load_config(preset="smoke", options=chosen, sets=["threads=1", "sampler.steps=4", "backbone.quadrature=10"])


def test_gradients_are_a_record_and_a_figure_at_the_base_model_and_at_a_checkpoint(tmp_path: Path) -> None:
    trials = [Trial(toy("vargrad"), Rule("cps", 0.5), leaves=6), Trial(toy("nft"))]
    done: list[tuple[int, int]] = []
    found = diagnose_gradients(trials, tmp_path / "out", prompts=1, repetitions=8, advance=lambda *d: done.append(d))
    assert done == [(1, 2), (2, 2)]
    assert GradientDiagnosis.model_validate(json.loads((tmp_path / "out" / "gradients.json").read_text())) == found
    assert (tmp_path / "out" / "gradients.png").is_file()
    first = found.trials[0]
    assert (first.objective, first.noise, first.leaves, first.divergence) == ("vargrad", "cps 0.5", 6, "reverse KL")
    assert found.trials[1].divergence is None
    run(toy("vargrad"), tmp_path / "run")
    later = diagnose_gradients(trials[:1], tmp_path / "later", run=tmp_path / "run", prompts=1, repetitions=8)
    assert later.iteration == toy("vargrad").iterations
    assert later.trials[0].snr != first.snr


@pytest.mark.parametrize(
    ("trials", "prompts", "message"),
    [
        ([Trial(toy("vargrad"))], 5, "--prompts 5 is too many: task 'equal_modes'"),
        ([Trial(toy("none"))], 2, "objective none trains nothing, so it has no gradient"),
        ([Trial(toy("vargrad")), Trial(toy("grpo", seed=1))], 2, "compared with one seed; give all trials the same"),
        ([Trial(toy("vargrad", reward={"mixture": 1.0}))], 2, "reward.mixture: task 'equal_modes' has no such reward"),
        ([Trial(toy("vargrad", backbone="tiny", task="ocr"))], 2, "use --backbone gaussian_mixture instead of tiny"),
    ],
)
def test_what_cannot_be_measured_is_refused(trials: list[Trial], prompts: int, message: str, tmp_path: Path) -> None:
    if message.endswith("tiny"):
        trials = [Trial(load_config(options={"backbone": "tiny", "objective": "vargrad", "sampler": "independent"}))]
    with pytest.raises(UserError, match=message):
        diagnose_gradients(trials, tmp_path / "out", prompts=prompts, repetitions=4)
    assert not (tmp_path / "out").exists()
