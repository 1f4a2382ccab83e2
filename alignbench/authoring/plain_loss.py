"""Plain loss functions on trial: a function of log-probabilities and advantages, as other libraries have them, as an objective.

Every tensor that the function gets has the shape [images, steps]; an advantage or a reward is the same at all steps of an
image. Arguments are known by their names, of which other libraries have several. A function of rewards is called for each
group, and the mean over groups is the loss; a function of advantages is called once.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from alignbench import groups
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.objective import Needs, Objective, with_elbo
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio, log_ratio_reference
from alignbench.runtime import import_path

NAMES = {
    "new": ("log_prob", "log_probs", "logprob", "logprobs", "logp", "logps", "new_log_prob", "new_log_probs", "log_prob_new",
            "log_probs_new", "new_logprobs", "new_logp", "logp_new", "per_token_logps"),
    "old": ("old_log_prob", "old_log_probs", "old_logprob", "old_logprobs", "old_logp", "old_logps", "log_prob_old",
            "log_probs_old", "logp_old", "old_per_token_logps"),
    "reference": ("ref_log_prob", "ref_log_probs", "ref_logprobs", "ref_logp", "reference_log_probs", "log_prob_ref",
                  "log_probs_ref", "log_prob_reference", "ref_per_token_logps"),
    "kl": ("kl", "kls"),
    "advantages": ("advantage", "advantages", "adv", "advs"),
    "rewards": ("reward", "rewards"),
    "mask": ("mask", "response_mask", "completion_mask"),
    "clip": ("clip", "clip_range", "cliprange", "clip_eps", "eps", "epsilon"),
}  # fmt: skip
"""Role -> the names of an argument that has it."""
CLIP = 1e-4
"""The clip of a function whose argument for it has no default."""
IMAGES, STEPS, WIDE = 6, 4, 1e6
"""Images and steps of the trials, and a clip that never acts."""
MOVED = 0.01
"""How far new log-probabilities are from the old ones where their ratio is on trial: inside most clips of a function's own."""
ALIKE = 1e-4
"""Largest relative difference of two gradients that count as equal."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Outcome = tuple[bool | None, str]
"""Whether the trial was passed, or None if it does not apply; and a sentence with the numbers."""


def function_named(name: str) -> Callable[..., Any] | None:
    """The function that `package.module:function` stands for; None where the name stands for something else."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        return None
    try:
        found = getattr(import_path.import_named(module_name), attribute, None)
    except Exception:
        return None  # the registry says what is wrong with the name
    return found if inspect.isfunction(found) else None


def wrapped(name: str, function: Callable[..., Any], settings: Mapping[str, Any], config: RunConfig) -> Objective:
    """Makes the objective of a plain function, with log-probabilities as the configuration has them."""
    objective = PlainLoss(name, function, settings)
    return with_elbo(objective, config.elbo) if config.likelihood == "elbo" else objective


class PlainLoss(Objective):
    """A plain function as an objective.

    Attributes:
        function: the function.
        roles: role -> the name of its argument.
        numbers: its other arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
        super().__init__(Objective.Settings())
        self.name, self.function = name, function
        self.roles: dict[str, str] = {}
        self.numbers: dict[str, Any] = dict(given)
        parameters = inspect.signature(function).parameters
        role_of = {alias: role for role, aliases in NAMES.items() for alias in aliases}
        if unknown := sorted(set(given) - set(parameters)):
            raise UserError(f"objective {name}: the function has no argument {unknown[0]!r}; it has {', '.join(parameters)}")
        for argument, parameter in parameters.items():
            role = role_of.get(argument)
            if role is not None:
                self.roles[role] = argument
            elif argument not in given and parameter.default is parameter.empty and parameter.kind not in VARIADIC:
                known = ", ".join(alias for aliases in NAMES.values() for alias in aliases)
                raise UserError(
                    f"objective {name}: the argument {argument!r} is not known; give it a value with --set "
                    f"objective.{argument}=..., or one of these names: {known}"
                )
        clip = self.roles.get("clip")
        if clip and clip not in given and parameters[clip].default is parameters[clip].empty:
            self.numbers[clip] = CLIP
        if "new" not in self.roles or not {"advantages", "rewards"} & set(self.roles):
            raise UserError(
                f"objective {name}: a loss function takes the new log-probabilities ({NAMES['new'][0]}), "
                "and advantages or rewards"
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference="reference" in self.roles or "kl" in self.roles)

    def value(self, tensors: Mapping[str, Tensor], **numbers: Any) -> Tensor:
        """Calls the function; of a tuple the first element counts.

        Args:
            tensors: role -> tensor [images, steps].
            numbers: arguments that replace those of the objective.
        """
        given = {self.roles[role]: tensor for role, tensor in tensors.items() if role in self.roles}
        answer = self.function(**{**self.numbers, **numbers, **given})
        loss: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return loss

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        old = forest.old_log_prob[forest.leaf_edges]
        tensors = {"new": old + log_ratio(terms, forest)[forest.leaf_edges], "old": old}
        if self.needs.reference:
            tensors["reference"] = tensors["new"].detach() - log_ratio_reference(terms)[forest.leaf_edges].detach()
            tensors["kl"] = terms["kl"][forest.leaf_edges]
        rewards = forest.by_group(forest.rewards)
        tensors["advantages"] = groups.standardise(rewards).reshape(-1, 1).expand_as(old)
        tensors["rewards"] = forest.rewards.float()[:, None].expand_as(old)
        tensors["mask"] = torch.ones_like(old)
        usable = groups.usable_leaves(rewards)
        losses = [self.value(part) for part in self._parts(tensors, usable)]
        return torch.stack(losses).mean() if losses else 0.0 * terms["log_prob"].sum()

    def _parts(self, tensors: Mapping[str, Tensor], usable: Tensor) -> list[dict[str, Tensor]]:
        """The tensors of one call of the function or, for a function of rewards, of a call for each group."""
        of_call = usable if "rewards" in self.roles else usable.view(1, -1)
        by_call = {role: tensor.view(*of_call.shape, -1) for role, tensor in tensors.items()}
        return [
            {role: tensor[call][leaves] for role, tensor in by_call.items()}
            for call, leaves in enumerate(of_call)
            if leaves.any()
        ]

    # ------------------------------------------------------------------------------------------------ trials

    def trial(self, moved: float = 0.0, images: int = IMAGES, steps: int = STEPS) -> dict[str, Tensor]:
        """Made-up tensors; `moved` is how far the new log-probabilities are from the old ones."""
        generator = torch.Generator().manual_seed(0)
        old, direction, reference = (torch.randn(images, steps, generator=generator, dtype=torch.float64) for _ in range(3))
        rewards = torch.arange(images, dtype=torch.float64)
        rewards = (rewards - rewards.mean()) / rewards.std(correction=0)
        spread = rewards[:, None].expand(images, steps).clone()
        return {
            "new": old + moved * direction.clamp(-2, 2),
            "old": old,
            "reference": old + 0.1 * reference,
            "kl": 0.01 * reference**2,
            "advantages": spread,
            "rewards": spread,
            "mask": torch.ones_like(old),
        }

    def gradients(self, tensors: Mapping[str, Tensor], **numbers: Any) -> dict[str, Tensor]:
        """Role -> the gradient of the function with respect to that tensor; zeros where it has none."""
        leaves = {role: tensor.clone().requires_grad_() for role, tensor in tensors.items()}
        loss = self.value(leaves, **numbers)
        if not loss.requires_grad:
            return {role: torch.zeros_like(tensor) for role, tensor in tensors.items()}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def without_clip(self) -> dict[str, float]:
        return {self.roles["clip"]: WIDE} if "clip" in self.roles else {}

    def without_kl(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors at which a KL penalty has neither value nor gradient."""
        return {**tensors, "reference": tensors["new"].clone(), "kl": torch.zeros_like(tensors["new"])}


def first_gradient(objective: PlainLoss) -> Outcome:
    """On the first update the ratio is 1, and the gradient is -A / (images steps), the policy gradient, at any size."""
    factors = []
    for images, steps in ((IMAGES, STEPS), (IMAGES, 2 * STEPS), (2 * IMAGES, STEPS)):
        tensors = objective.without_kl(objective.trial(images=images, steps=steps))
        found, expected = objective.gradients(tensors)["new"], -tensors["advantages"] / (images * steps)
        if not found.any():
            return False, "the gradient at equal new and old log-probabilities is zero: the ratio has none, or is detached"
        cosine = float((found * expected).sum() / (found.norm() * expected.norm()))
        if cosine < 1 - ALIKE:
            return False, f"the gradient is not along that of -A log p: their cosine is {cosine:.3f}"
        factors.append(float(found.norm() / expected.norm()))
    sizes = (1.0, *(factor / factors[0] for factor in factors[1:]))
    for what, size in (("steps", sizes[1]), ("images", sizes[2])):
        if abs(size - 1) > ALIKE:
            why = f"with twice the {what} the gradient is {size:.3g} times that of a mean over {what}"
            return False, f"{why}: a sum for a mean, or the reverse"
    return True, f"{factors[0]:.3g} times that of the policy gradient"


def importance_ratio(objective: PlainLoss) -> Outcome:
    """Away from the old policy the gradient is that of -A new / old."""
    if "old" not in objective.roles:
        return None, "the function takes no old log-probabilities"
    tensors = objective.without_kl(objective.trial(moved=MOVED))
    first = objective.gradients(objective.without_kl(objective.trial()))["new"]
    found = objective.gradients(tensors, **objective.without_clip())["new"]
    expected = first * torch.exp(tensors["new"] - tensors["old"])
    if (found - first).norm() < ALIKE * first.norm():
        return False, "the gradient does not depend on the old log-probabilities: the ratio is always 1"
    unclipped = found != 0  # the function may have a clip of its own that is no argument
    if not unclipped.any():
        return None, "a clip inside the function stops all gradients"
    off = float((found - expected)[unclipped].norm() / expected[unclipped].norm())
    return off < ALIKE, f"relative difference to -A new / old: {off:.0e}"


def nothing_else_trained(objective: PlainLoss) -> Outcome:
    """Old and reference log-probabilities, advantages and rewards get no gradient."""
    gradients = objective.gradients(objective.trial(moved=0.1), **objective.without_clip())
    # The caller may have detached these already; a function that relies on it works only with that caller.
    leaking = [
        objective.roles[role]
        for role in ("old", "reference", "advantages", "rewards")
        if role in objective.roles and gradients[role].any()
    ]
    if not leaking:
        return True, "only the new log-probabilities get a gradient"
    return None, f"{', '.join(leaking)} would get a gradient if the caller did not detach them"


def clip_acts(objective: PlainLoss) -> Outcome:
    """A ratio that went far in the direction of its advantage gets no gradient; one that went the other way does."""
    if "clip" not in objective.roles:
        return None, "the function has no clip"
    tensors = objective.without_kl(objective.trial(moved=0.5))
    found = objective.gradients(tensors, **{objective.roles["clip"]: 0.01})["new"]
    change = tensors["new"] - tensors["old"]
    outward, far = change * tensors["advantages"] > 0, (torch.exp(change) - 1).abs() > 0.02
    if bool(found[outward & far].any()):
        return False, "a ratio beyond the clip still has a gradient"
    if not bool(found[~outward & far].all()):
        return False, "a ratio that moved against its advantage has no gradient, so a wrong step is never taken back"
    return True, "beyond the clip there is none, and a step back has one"


def kl_acts(objective: PlainLoss) -> Outcome:
    """A KL penalty has a gradient."""
    if not objective.needs.reference:
        return None, "the function has no KL penalty"
    tensors = objective.trial()
    if "kl" in objective.roles and objective.gradients(tensors)["kl"].any():
        return True, "the loss has a gradient with respect to the KL divergence"
    if "reference" in objective.roles:
        here, at_reference = (objective.gradients(t)["new"] for t in (tensors, objective.without_kl(tensors)))
        if (here - at_reference).norm() > 1e-9 * here.norm():
            return True, "the gradient depends on the reference"
    if not torch.equal(objective.value(tensors), objective.value(objective.without_kl(tensors))):
        return False, "the KL penalty changes the loss and has no gradient: it is computed without one"
    return False, "the KL penalty has no effect; is its weight 0?"


CHECKS: dict[str, Callable[[PlainLoss], Outcome]] = {
    "first gradient": first_gradient,
    "importance ratio": importance_ratio,
    "gradient to nothing else": nothing_else_trained,
    "clip": clip_acts,
    "KL penalty": kl_acts,
}
