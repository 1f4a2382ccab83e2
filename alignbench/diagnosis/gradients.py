"""`diagnose --gradients`: an objective's gradient estimates against the gradient of the divergence that it claims to descend.

An estimate is the gradient of one iteration: one group per prompt, drawn by a sampler, and one backward pass of the loss. It
is repeated with new noise. The exact gradient is that of the claimed divergence (`Objective.descends`) between distributions of
paths of the memoryless rule, in as many denoising steps as the sampler takes; see `exact_gradient`. R~ is the objective's own,
in the unit that it has in a group of thousands of leaves.

The difference between the two shows the cost of a choice: few leaves, rewards that are standardised within them, a single
root, a rule whose paths have another distribution, or a log-density that is averaged over latent dimensions.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.diagnosis import gradient_figure
from alignbench.diagnosis import gradient_statistics as statistics
from alignbench.diagnosis.draws import training_prompts
from alignbench.diagnosis.exact_gradient import Paths, mean_gradient
from alignbench.diagnosis.record import GradientDiagnosis, GradientTrial
from alignbench.diagnosis.writing import measured_into
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.load import load_configured_backbone, load_objective, load_sampler, threads_of
from alignbench.objective import Divergence, Objective
from alignbench.records.environment import environment
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_of
from alignbench.rollouts.plan import Plan, Step
from alignbench.sampler import Sampler
from alignbench.tasks import trained_task
from alignbench.training.checkpoint import judged_weights, policy_weights
from alignbench.training.engine import backward

REPETITIONS = 256
"""Default number of gradient estimates of each trial."""
SHARED = ("backbone", "task", "seed", "reward", "evals", "scorer_url")
"""Keys of the configuration that all trials must have in common."""
LEAVES = 2048
"""Number of leaves of the groups from which the unit of R~ is computed."""


@dataclass(frozen=True)
class Rule:
    """A rule of stochastic steps, with its eta; None for the sampler's default eta."""

    name: str
    eta: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Parses `sde` or `sde:0.7`; raises UserError for anything else."""
        name, _, eta = text.partition(":")
        try:
            return cls(name, float(eta) if eta else None)
        except ValueError:
            raise UserError(f"--rules takes a list such as sde:0.7,cps,memoryless; got {text!r}") from None

    def settings(self) -> dict[str, object]:
        """The settings of a sampler that choose the rule."""
        return {"rule": self.name} | ({} if self.eta is None else {"noise_level": self.eta})


@dataclass(frozen=True)
class Trial:
    """One combination of objective, sampler, rule and group size whose gradient estimates are measured.

    Attributes:
        config: the configuration, which names the objective and the sampler.
        rule: the rule that replaces the sampler's; None keeps it.
        leaves: K, which is reached by changing the number of roots; None keeps the sampler's.
    """

    config: RunConfig
    rule: Rule | None = None
    leaves: int | None = None

    def sampler(self) -> Sampler:
        """Loads the sampler with the rule; raises UserError if they do not fit."""
        plugin = self.config.sampler
        kept = {k: v for k, v in plugin.settings.items() if self.rule is None or k not in ("rule", "noise_level")}
        return load_sampler(plugin.name, **kept, **(self.rule.settings() if self.rule else {}))

    def plan(self, sampler: Sampler, progress: float, repetition: int) -> Plan:
        """Makes the plan of a repetition; raises UserError if K cannot be reached."""
        plan = sampler.plan(progress, np.random.default_rng([self.config.seed, 1, repetition]))
        return plan if self.leaves is None else with_leaves(plan, self.leaves, self.config.sampler.name)


def with_leaves(plan: Plan, leaves: int, sampler: str) -> Plan:
    """Changes the number of roots of a plan, so that it has a given number of leaves.

    Args:
        plan: the plan.
        leaves: the number of leaves.
        sampler: name of the sampler, for the message.

    Raises:
        UserError: the number is below two, or not a multiple of the leaves of one root.
    """
    leaves_per_root = plan.leaves // plan.roots
    if leaves < 2 or leaves % leaves_per_root:
        raise UserError(
            f"--leaves {leaves} does not fit sampler {sampler}: it draws {leaves_per_root} leaves from each root, and a group "
            "needs at least two; give a multiple"
        )
    return replace(plan, roots=leaves // leaves_per_root)


def diagnose_gradients(
    trials: Sequence[Trial],
    out: Path,
    *,
    run: Path | None = None,
    prompts: int = 4,
    repetitions: int | None = None,
    progress: float = 0.5,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> GradientDiagnosis:
    """Measures gradient estimates and writes `gradients.json` and `gradients.png` into the folder `out`.

    Args:
        trials: at least one; their configurations have the same backbone, task, reward and seed. The reward is what a run
            with the configuration trains on.
        out: a new or empty folder.
        run: folder of a run at whose newest checkpoint gradients are taken; None for the base model.
        prompts: number of the task's training prompts, each with one group in an estimate.
        repetitions: estimates of each trial.
        progress: training progress, 0 to 1, at which plans are drawn.
        advance: called with the trials that are done and their number.

    Raises:
        UserError: a setting is wrong, there is no checkpoint, or the folder is taken; nothing has been written.
        RunError: a scorer failed.
    """
    repeated = repetitions or REPETITIONS
    return measured_into(
        out, "gradients", lambda: _measured(trials, run, prompts, repeated, progress, advance), gradient_figure.draw
    )


def _measured(
    trials: Sequence[Trial],
    run: Path | None,
    prompts: int,
    repetitions: int,
    progress: float,
    advance: Callable[[int, int], None],
) -> GradientDiagnosis:
    config = trials[0].config
    task = trained_task(config)
    chosen = training_prompts(task, prompts)
    _check(trials, progress)
    weights = policy_weights(run / "checkpoints") if run else None
    metrics = MetricSuite(task, config.scorer_timeout)
    metrics.require()
    policy = load_configured_backbone(config)
    if policy.latent_shape != (2,):
        raise UserError(
            "--gradients compares with an exact gradient, which is known for latents of two values; use "
            f"--backbone gaussian_mixture instead of {config.backbone.name}"
        )
    if len(metrics.weights) != 1:
        raise UserError(
            f"--gradients needs a task with one reward; {task.name!r} has {', '.join(metrics.weights)}; set the weights of the "
            "others to 0 (reward.NAME=0)"
        )
    estimator = GradientEstimator(policy, metrics, chosen, weights.iteration if weights else 0, progress)
    began = time.perf_counter()
    # A policy that has just been loaded is the base model, and unlike the reference it has gradients.
    with judged_weights(policy, weights) if weights else nullcontext():
        results = _results(estimator, trials, repetitions, advance)
    return GradientDiagnosis(
        backbone=config.backbone.name,
        task=task.name,
        seed=config.seed,
        prompts=estimator.prompts,
        repetitions=repetitions,
        progress=progress,
        log_prob_reduction=config.log_prob_reduction,
        trials=results,
        seconds=time.perf_counter() - began,
        environment=environment(str(policy.device), threads_of(config)),
        configs={f"{t.config.objective.name} x {t.config.sampler.name}": t.config.resolved() for t in trials},
        checkpoint=str(run) if run else None,
        iteration=weights.iteration if weights else None,
    )


def _results(
    estimator: "GradientEstimator", trials: Sequence[Trial], repetitions: int, advance: Callable[[int, int], None]
) -> list[GradientTrial]:
    results = []
    for done, trial in enumerate(trials, 1):
        results.append(estimator.result(trial, repetitions))
        advance(done, len(trials))
    return results


def _check(trials: Sequence[Trial], progress: float) -> None:
    """Refuses what cannot work before anything is loaded; raises UserError."""
    first = trials[0].config
    for key in SHARED:
        if any(getattr(trial.config, key) != getattr(first, key) for trial in trials):
            raise UserError(f"gradients are compared with one {key}; give all trials the same")
    for trial in trials:
        trial.plan(trial.sampler(), progress, 0)
        plugin = trial.config.objective
        if not load_objective(plugin.name, **plugin.settings).needs.training:
            raise UserError(f"objective {plugin.name} trains nothing, so it has no gradient; leave it out")


class GradientEstimator:
    """Estimates gradients of one policy on one task, and computes the exact ones.

    Attributes:
        policy: the policy, with latents of two values.
        metrics: the task's metrics, with a single reward.
        prompts: the prompts; every estimate has one group of each.
        iteration: the iteration that objectives see, for schedules.
        progress: the training progress that samplers and objectives see.
    """

    def __init__(
        self,
        policy: Backbone,
        metrics: MetricSuite,
        prompts: Sequence[str],
        iteration: int = 0,
        progress: float = 0.5,
    ) -> None:
        self.policy, self.metrics, self.prompts = policy, metrics, list(prompts)
        self.iteration, self.progress = iteration, progress
        self.paths: dict[int, list[Paths]] = {}
        self.gradients: dict[tuple[object, ...], tuple[Divergence, Tensor] | None] = {}

    def result(self, trial: Trial, repetitions: int) -> GradientTrial:
        """Repeats the gradient estimate of one trial and compares it with the exact gradient."""
        objective = self._objective(trial.config)
        gradients, rows, plan = self.estimates(trial, objective, repetitions)
        exact = self.exact(trial.config, objective, plan.schedule_indices[-1])
        products = statistics.Products.of(gradients, exact[1] if exact else None)
        none = statistics.unknown(repetitions)
        first = next((step for step in plan.steps if step.stochastic), plan.steps[0])
        return GradientTrial(
            objective=trial.config.objective.title,
            sampler=trial.config.sampler.title,
            rule=first.rule,
            eta=first.eta,
            leaves=plan.leaves,
            steps=plan.schedule_indices[-1],
            divergence=exact[0].name if exact else None,
            cosine=statistics.estimate(statistics.cosine, products) if exact else none,
            relative_bias=statistics.bias_estimate(products) if exact else none,
            scale=statistics.estimate(statistics.scale, products) if exact else none,
            snr=statistics.estimate(statistics.signal_to_noise, products),
            model_rows=rows,
        )

    def estimates(self, trial: Trial, objective: Objective, repetitions: int) -> tuple[Tensor, int, Plan]:
        """Draws gradient estimates, each from rollouts of its own and an objective without a past.

        Returns:
            The gradients, float32 [repetitions, parameters], the model rows of one, and the plan of the last.
        """
        config, sampler = trial.config, trial.sampler()
        gradients, rows = [], 0
        for i in range(repetitions):
            plan = trial.plan(sampler, self.progress, i)
            seed = seed_of("gradients", config.seed, i)
            fresh = deepcopy(objective)
            if fresh.needs.rollouts_from_reference:
                with self.policy.reference():
                    forest = self.forest(plan, seed, config)
            else:
                forest = self.forest(plan, seed, config)
            trained = sampler.trained_leaves(forest)
            if trained is not None:
                forest.train_only(trained)
            gradient, training_rows = self.gradient(fresh, forest)
            rows = plan.model_rows(len(self.prompts)) + training_rows
            gradients.append(gradient)
        return torch.stack(gradients), rows, plan

    def exact(self, config: RunConfig, objective: Objective, steps: int) -> tuple[Divergence, Tensor] | None:
        """Returns the divergence that an objective claims, with its gradient, float32 [parameters]; None if it claims none."""
        key = (config.objective.name, str(sorted(config.objective.settings.items())), config.seed, steps)
        if key not in self.gradients:
            self.gradients[key] = self._exact(config, objective, steps)
        return self.gradients[key]

    def _exact(self, config: RunConfig, objective: Objective, steps: int) -> tuple[Divergence, Tensor] | None:
        plan = Plan((*[Step("memoryless", 1.0)] * (steps - 1), Step()), roots=LEAVES)
        forest = self.forest(plan, seed_of("unit of the reward", config.seed), config)
        fresh = deepcopy(objective)
        fresh.observe(forest)
        divergence = fresh.descends(forest)
        if divergence is None:
            return None
        if steps not in self.paths:
            self.paths[steps] = [Paths(self.policy, prompt, steps, partial(self._scored, prompt)) for prompt in self.prompts]
        units = [unit_of(*pair) for pair in zip(fresh.target_reward(forest), forest.by_group(forest.rewards), strict=True)]
        return divergence, mean_gradient(self.paths[steps], divergence, units)

    def _scored(self, prompt: str, latents: Tensor) -> Tensor:
        """The rewards of final latents, float64 [N]."""
        scores = self.metrics.score(self.policy.decode(latents), [prompt] * len(latents), when="for the exact gradient")
        (name, weight), *_ = self.metrics.weights.items()
        if bool(np.isnan(scores[name]).any()):
            raise RunError(f"reward {name} gave no score for some samples, so its expected value is unknown")
        return weight * torch.from_numpy(scores[name])

    def forest(self, plan: Plan, seed: int, config: RunConfig) -> RolloutForest:
        """Draws and scores one group for each prompt; raises RunError if no image could be scored."""
        forest = rollout(
            self.policy,
            self.prompts,
            plan,
            seed,
            self.iteration,
            reduction=config.log_prob_reduction,
            progress=self.progress,
        )
        scores = self.metrics.score(self.policy.decode(forest.leaf_latents), forest.leaf_prompts, when="in a gradient estimate")
        by_group = {name: forest.by_group(torch.from_numpy(values)) for name, values in scores.items()}
        rewards = groups.total(by_group, self.metrics.weights, normalise=config.normalise_rewards)
        if bool(rewards.isnan().all()):
            raise RunError("no image of a gradient estimate could be scored")
        forest.set_rewards(rewards, by_group, self.metrics.weights, normalise=config.normalise_rewards)
        return forest

    def gradient(self, objective: Objective, forest: RolloutForest) -> tuple[Tensor, int]:
        """Computes the gradient of an objective's first update on a rollout.

        Returns:
            The gradient, float32 [parameters], and the model rows of the pass.
        """
        parameters = list(self.policy.parameters())
        for parameter in parameters:
            parameter.grad = None
        objective.observe(forest)
        done = backward(self.policy, objective, forest, on_policy=not objective.needs.rollouts_from_reference)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return torch.cat([part.detach().flatten() for part in parts]), done.forward_rows

    def _objective(self, config: RunConfig) -> Objective:
        torch.manual_seed(config.seed)
        objective = load_objective(config.objective.name, **config.objective.settings)
        objective.prepare(self.policy.latent_shape, self.policy.device)
        return objective


def unit_of(target_reward: Tensor, rewards: Tensor) -> float:
    """Computes the change of R~ in a group for a change of the reward by 1; 0 if all rewards are equal.

    Args:
        target_reward: R~, a linear function of the reward, [K].
        rewards: [K], NaN where one is missing.
    """
    scored = groups.valid(rewards)
    r, z = rewards[scored].double(), target_reward[scored].double()
    low, high = r.argmin(), r.argmax()
    return float((z[high] - z[low]) / (r[high] - r[low])) if bool(r[high] > r[low]) else 0.0
