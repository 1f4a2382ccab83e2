"""Correctness checks on any (objective, sampler, backbone), for authors of plug-ins before a long run.

Each check uses the real executor and engine with artificial rewards, so no scorer is needed. A check that does not apply to a
plug-in says so; it then neither passes nor fails.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from scipy import stats
from torch import Tensor

from alignbench.authoring import plain_loss
from alignbench.authoring.plain_loss import PlainLoss
from alignbench.backbone import Backbone, KnownDistributions
from alignbench.config.run_config import RunConfig
from alignbench.errors import NonFiniteError, RunError, UserError
from alignbench.load import load_configured_backbone, load_configured_objective, load_configured_sampler
from alignbench.objective import Objective
from alignbench.rollouts.executor import rollout, sample
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_torch
from alignbench.rollouts.plan import Plan
from alignbench.rollouts.terms import log_ratio
from alignbench.sampler import Sampler
from alignbench.tasks import load_task
from alignbench.training import engine

PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
GROUPS = 2
LEARNING_RATE = 3.0
"""Learning rate of the learning check, in units of the configuration's; it is larger because the check is short."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between two gradients that rounding may cause when sums are taken in another order."""
PROPERTIES = ("equal rewards", "shifted rewards")
"""Checks that a correct objective may fail, because absolute rewards can have a meaning for it."""

Outcome = tuple[bool | None, str]
"""Whether the check passed, or None if it does not apply; and a sentence with the numbers."""


class CheckResult(BaseModel):
    """The result of one check.

    Attributes:
        name: name of the check.
        holds: whether it passed; None if it does not apply.
        detail: the numbers behind the result.
        required: whether the plug-in is wrong if the check fails.
    """

    name: str
    holds: bool | None
    detail: str
    required: bool

    @property
    def failed(self) -> bool:
        """Whether the check shows that the plug-in is wrong."""
        return self.required and self.holds is False


@dataclass(frozen=True)
class Subject:
    """The plug-ins that are checked. `objective` is a factory, because some objectives remember earlier rollouts."""

    objective: Callable[[], Objective]
    sampler: Sampler
    policy: Backbone
    prompts: tuple[str, ...]

    def plan(self, progress: float = 0.5) -> Plan:
        """Makes the sampler's plan at some progress of the training."""
        return self.sampler.plan(progress, np.random.default_rng(0))

    def fresh_objective(self) -> Objective:
        """Makes an objective that has seen no rollout; its parameters are the same each time."""
        # The state of the global generator is kept, so that a model which wrongly draws from it gets new numbers each time.
        with torch.random.fork_rng(devices=[]):
            seed_torch(0)
            objective = self.objective()
            objective.prepare(self.policy.latent_shape, self.policy.device)
        return objective

    def forest(self, micro_batch: int | None = None) -> RolloutForest:
        """Draws a rollout with random rewards, no two of which are equal."""
        forest = rollout(self.policy, list(self.prompts), self.plan(), seed=0, micro_batch=micro_batch)
        rewards = np.random.default_rng(1).permutation(len(forest.leaves)) / len(forest.leaves)
        forest.rewards = torch.tensor(rewards, dtype=torch.float32, device=forest.states.device)
        return forest

    def gradient(self, forest: RolloutForest, micro_batch: int | None = None) -> tuple[engine.Backward, Tensor]:
        """Runs the backward pass of a fresh objective, and returns it with the gradient of all parameters as one vector.

        Parameters that the loss does not depend on have a gradient of 0.
        """
        objective = self.fresh_objective()
        parameters = [*self.policy.parameters(), *objective.parameters()]
        for parameter in parameters:
            parameter.grad = None
        objective.observe(forest)
        backward = engine.backward(self.policy, objective, forest, micro_batch=micro_batch)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
        return backward, torch.cat(flat)


def subject_of(config: RunConfig) -> Subject:
    """Loads the pair and the model of a configuration, with the first prompts of its task.

    Raises:
        UserError: a plug-in cannot be built from its settings.
    """
    o = config.objective
    function = plain_loss.function_named(o.name)
    if function is None:
        objective = partial(load_configured_objective, config)
    else:
        objective = partial(plain_loss.wrapped, o.name, function, o.settings, config)
    objective()
    sampler = load_configured_sampler(config)
    prompts = tuple(load_task(config.task).train_prompts[:GROUPS])
    return Subject(objective, sampler, load_configured_backbone(config), prompts)


def run_checks(subject: Subject, *, iterations: int = 20, lr: float = 3e-4) -> Iterator[CheckResult]:
    """Runs all checks, one after the other, and yields their results.

    Args:
        subject: the plug-ins.
        iterations: training iterations of the learning check; 0 skips it.
        lr: learning rate of the learning check (Adam).

    Raises:
        UserError: the pair cannot run at all, for instance an objective on path densities with a plan that has none.
    """
    checks = dict(OF_THE_ROLLOUT)
    if isinstance(subject.fresh_objective(), PlainLoss):
        checks |= {name: partial(_of_a_plain_loss, check) for name, check in plain_loss.CHECKS.items()}
    if subject.fresh_objective().needs.training:
        checks |= OF_THE_OBJECTIVE
        if iterations:
            checks["learning"] = lambda s: _learning(s, iterations, lr)
    for name, check in checks.items():
        try:
            holds, detail = check(subject)
        except UserError:
            raise
        except RunError as error:
            holds, detail = False, str(error)
        except Exception as error:
            holds, detail = False, _described(error, subject)
        yield CheckResult(name=name, holds=holds, detail=detail, required=name not in PROPERTIES)
        if check is _plan and not holds:
            return  # nothing else can be checked without a plan


def _of_a_plain_loss(check: Callable[[PlainLoss], Outcome], s: Subject) -> Outcome:
    objective = s.fresh_objective()
    assert isinstance(objective, PlainLoss)
    return check(objective)


def _described(error: Exception, s: Subject) -> str:
    """The exception that a plug-in raised, and the line in its file."""
    objective = s.objective()
    written = objective.function if isinstance(objective, PlainLoss) else type(objective)
    files = {inspect.getfile(plugin) for plugin in (written, type(s.sampler), type(s.policy))}
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f" in {places[-1].filename}, line {places[-1].lineno}" if places else ""
    return f"{type(error).__name__}{where}: {error}"


def _plan(s: Subject) -> Outcome:
    """The same seed gives the same plan, and every plan has at least two leaves at any progress of the training."""
    for progress in PROGRESS:
        for seed in range(20):
            one, two = (s.sampler.plan(progress, np.random.default_rng(seed)) for _ in range(2))
            if one != two:
                return False, f"two plans at progress {progress:g} with equal seeds differ"
            if one.leaves < 2 * one.groups:
                return False, f"the plan at progress {progress:g} has {one.leaves // one.groups} leaf per group"
    plan = s.plan()
    splits = ", ".join(map(str, plan.splits)) or "none"
    in_groups = f" in {plan.groups} groups" if plan.groups > 1 else ""
    return True, f"{plan.leaves} leaves{in_groups}, {len(plan.stochastic_steps)} stochastic steps, splits at {splits}"


def _rollout_rows(s: Subject) -> Outcome:
    """A rollout costs as many model evaluations as planned, with one model call per place in the schedule."""
    with _counted(s.policy) as count:
        s.forest()
    plan = s.plan()
    expected = plan.model_rows(len(s.prompts))
    holds = count["rows"] == expected and count["calls"] == len(plan.calls)
    return holds, f"{count['rows']} model evaluations in {count['calls']} calls; the plan has {expected} in {len(plan.calls)}"


def _micro_batch(s: Subject) -> Outcome:
    """A rollout in micro-batches ends in the same latents."""
    whole, cut = s.forest().leaf_latents, s.forest(micro_batch=3).leaf_latents
    off = float((whole - cut).norm() / whole.norm())  # single values may be a few times as far, after many steps
    return off < ROUNDING.get(s.policy.dtype, 1e-4), f"relative difference {off:.0e}"


def _replay_rows(s: Subject) -> Outcome:
    """An objective that replays paths evaluates the model once for each distinct parent state."""
    forest, objective = s.forest(), s.fresh_objective()
    rows = objective.rows(forest, 0)
    if not objective.replays:
        return None, f"the objective has {len(rows)} rows of its own and does not replay paths"
    distinct = len(torch.unique(forest.states[forest.rows].flatten(1), dim=0))
    paths = forest.leaf_edges.numel()
    return len(rows) == distinct, f"{len(rows)} rows for {distinct} distinct parent states of {paths} steps on paths"


def _ratio_one(s: Subject) -> Outcome:
    """On the first update after a rollout the importance ratio is 1."""
    forest = s.forest()
    backward, _ = s.gradient(forest)
    if "log_prob" not in backward.terms:
        return None, "the objective does not use log-probabilities of paths"
    off = float(torch.expm1(log_ratio(backward.terms, forest)).abs().max())
    return off <= engine.RATIO_TOLERANCE.get(s.policy.dtype, 1e-5), f"max |ratio - 1| {off:.0e}"


def _gradient(s: Subject) -> Outcome:
    """The gradients with micro-batches of 1 and 3 are equal to that of a single pass, and not zero."""
    forest = s.forest()
    _, whole = s.gradient(forest)
    size = float(whole.norm())
    if size == 0:
        return False, "the gradient is zero: nothing would be learnt from different rewards"
    off = max(float((s.gradient(forest, micro_batch)[1] - whole).norm()) / size for micro_batch in (1, 3))
    return off < ROUNDING.get(s.policy.dtype, 1e-4), f"norm {size:.3g}, relative difference {off:.0e}"


def _permutation(s: Subject) -> Outcome:
    """The order of the leaves in a group has no effect on the gradient."""
    forest = s.forest()
    if not s.fresh_objective().replays:
        return None, "the objective has rows of its own, whose noise may depend on the order"
    k = forest.group_size
    order = torch.cat([g * k + torch.arange(k).flip(0) for g in range(forest.groups)]).to(forest.leaves.device)
    turned = replace(forest, leaves=forest.leaves[order], leaf_edges=forest.leaf_edges[order], rewards=forest.rewards[order])
    return _same_gradient(s, forest, turned)


def _finite(s: Subject) -> Outcome:
    """Loss and gradient are finite, also if an image or a whole group could not be scored."""
    cases = ((0, "with all rewards"), (1, "without one reward"), (s.plan().leaves, "without the rewards of a group"))
    for unscored, what in cases:
        forest = s.forest()
        forest.rewards[:unscored] = torch.nan
        try:
            backward, gradient = s.gradient(forest)
        except NonFiniteError as error:
            return False, f"{what}: {error}"
        norm = float(gradient.norm())
        if not (np.isfinite(backward.loss) and np.isfinite(norm)):
            return False, f"{what}: loss {backward.loss:.3g}, gradient norm {norm:.3g}"
    return True, "also if an image or a whole group could not be scored"


def _equal_rewards(s: Subject) -> Outcome:
    """Equal rewards give zero gradient."""
    forest = s.forest()
    forest.rewards[:] = 0.5
    gradient = s.gradient(forest)[1][: sum(p.numel() for p in s.policy.parameters())]
    return float(gradient.abs().max()) == 0, f"largest gradient {float(gradient.abs().max()):.0e}"


def _shift(s: Subject) -> Outcome:
    """Adding a constant to all rewards does not change the gradient."""
    forest = s.forest()
    return _same_gradient(s, forest, replace(forest, rewards=forest.rewards + 2.0))


def _learning(s: Subject, iterations: int, lr: float) -> Outcome:
    """Training on the brightness of images makes images brighter (one-sided paired t-test at 1 %).

    For a backbone without images, the reward is the mean of the final latents.
    """
    objective = s.fresh_objective()
    kept = [p.detach().clone() for p in s.policy.parameters()]
    before = _sampled_brightness(s)
    optimizer = torch.optim.Adam([*s.policy.parameters(), *objective.parameters()], lr=lr)
    try:
        for i in range(iterations):
            plan = s.sampler.plan(i / max(iterations - 1, 1), np.random.default_rng(i))
            forest = rollout(s.policy, list(s.prompts), plan, seed=1, iteration=i, progress=i / max(iterations - 1, 1))
            forest.rewards = _brightness(s.policy, forest.leaf_latents)
            objective.observe(forest)
            optimizer.zero_grad(set_to_none=True)
            engine.backward(s.policy, objective, forest)
            optimizer.step()
        after = _sampled_brightness(s)
    finally:
        with torch.no_grad():
            for parameter, value in zip(s.policy.parameters(), kept, strict=True):
                parameter.copy_(value)
    test = stats.ttest_rel(after, before, alternative="greater")
    change = float((after - before).mean())
    went = f"{before.mean():.3f} to {after.mean():.3f} ({change:+.3f}, p = {test.pvalue:.1g})"
    what = "mean latent" if isinstance(s.policy, KnownDistributions) else "brightness"
    more = "; try more --iterations" if change > 0 and not test.pvalue < 0.01 else ""
    return bool(test.pvalue < 0.01), f"{what} {went} in {iterations} iterations{more}"


def _sampled_brightness(s: Subject) -> np.ndarray:
    """The brightness of images that the policy samples from fixed noise, float64 [N]."""
    latents = sample(s.policy, list(s.prompts), 16, s.policy.default_steps, seed=2)
    return np.asarray(_brightness(s.policy, latents).cpu(), dtype=np.float64)


def _brightness(policy: Backbone, latents: Tensor) -> Tensor:
    """The mean pixel value of each image, 0 to 1, [N]; for a backbone without images, the mean of each latent."""
    if isinstance(policy, KnownDistributions):
        return latents.flatten(1).mean(1)
    images = policy.decode(latents)
    return torch.from_numpy(images.reshape(len(images), -1).mean(1) / 255.0).float().to(latents.device)


def _same_gradient(s: Subject, one: RolloutForest, two: RolloutForest) -> Outcome:
    first, second = s.gradient(one)[1], s.gradient(two)[1]
    off = float((first - second).norm() / first.norm().clamp(min=1e-30))
    return off < ROUNDING.get(s.policy.dtype, 1e-4), f"relative difference of the gradients {off:.0e}"


@contextmanager
def _counted(policy: Backbone) -> Iterator[dict[str, int]]:
    """Counts the calls and rows of `policy.velocity` inside the context."""
    count = {"calls": 0, "rows": 0}
    original: Any = policy.velocity  # the class's method, bound

    def velocity(x: Tensor, *arguments: Any) -> Tensor:
        count["calls"] += 1
        count["rows"] += len(x)
        answer: Tensor = original(x, *arguments)
        return answer

    policy.velocity = velocity  # type: ignore[method-assign, assignment]
    try:
        yield count
    finally:
        del policy.velocity  # restores the method of the class


OF_THE_ROLLOUT: dict[str, Callable[[Subject], Outcome]] = {
    "plan": _plan,
    "rollout rows": _rollout_rows,
    "rollout at any micro-batch": _micro_batch,
}
OF_THE_OBJECTIVE: dict[str, Callable[[Subject], Outcome]] = {
    "replay rows": _replay_rows,
    "first ratio is 1": _ratio_one,
    "gradient at any micro-batch": _gradient,
    "order of leaves": _permutation,
    "finite": _finite,
    "equal rewards": _equal_rewards,
    "shifted rewards": _shift,
}
