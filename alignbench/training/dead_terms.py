"""Dead terms: what each part of a loss contributes to the gradient, and what cannot act in a run's configuration.

Some of it is known beforehand (`Objective.ineffective_settings`, `Objective.ineffective_parts`). The rest is measured on the
terms of the first updates, which are small tensors: d(loss)/d(terms) of each part, without another pass of the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignbench.loss_parts import measured_parts
from alignbench.objective import Objective
from alignbench.records.record import GradientRecord
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, Velocities

ITERATIONS = 3
"""Number of first iterations whose updates are measured."""
DEAD = 1e-9
"""The share of the gradient up to which a part or term counts as dead: differences by rounding are below it."""
STOCK = {
    *("log_prob", "log_ratio", "drift_noise", "kl_behaviour"),
    *("kl", "log_prob_reference", "log_ratio_reference", "error", "error_reference"),
}
"""Terms that every objective of a kind has, whether its loss uses them or not."""
POLICY = "policy"
ROWS = 8
"""Number of rows on which it is found out which terms depend on which model."""
WHOLE, REST = "loss", "rest"
"""Names for a loss that marks no parts, and for what is not marked in one that does."""
Measured = dict[str, dict[str, float]]
"""`parts`, `terms` and `models` -> name -> norm of the gradient."""


def measure(objective: Objective, terms: Terms, forest: RolloutForest, update: int) -> Measured | None:
    """What one update says about the parts of the loss; no model is evaluated.

    Args:
        terms: of the update, detached.
        forest: the rollout, with rewards.
        update: the number of that update of the rollout.

    Returns:
        The norms of d(part)/d(terms) for each part of the loss, of d(loss)/d(term) for each term that depends on the policy,
        and of d(loss)/d(terms that depend on a model) for the reference and the behaviour policy, if the objective needs them.
        None where nothing has a gradient, as in a rollout of equal rewards.
    """
    if not terms:
        return None
    forest.update = update
    leaves = {name: value.detach().requires_grad_() for name, value in terms.items() if value.is_floating_point()}

    def gradient(only: str | None) -> dict[str, Tensor]:
        with measured_parts(only):
            return _gradient(objective.loss({**terms, **leaves}, forest), leaves)

    with measured_parts() as marked:
        norms = {n: float(g.norm()) for n, g in _gradient(objective.loss({**terms, **leaves}, forest), leaves).items()}
    if not any(norms.values()):
        return None
    unmarked = gradient(only="")
    rest = _total(unmarked.values())
    of_parts = {WHOLE: rest} if not marked.names else {REST: rest} if rest else {}
    for part in marked.names:
        with_rest = gradient(only=part)
        of_parts[part] = _total(with_rest[name] - unmarked[name] for name in leaves)
    depend = _dependent_terms(objective, forest, update)
    of_terms = {name: norms[name] for name in norms if name in depend[POLICY]}
    of_models = {model: sum(norms.get(n, 0.0) for n in names) for model, names in depend.items() if model != POLICY}
    return {"parts": of_parts, "terms": of_terms, "models": of_models}


def gradient_record(measured: Sequence[Measured], objective: Objective, updates_per_rollout: int) -> GradientRecord:
    """The shares of the gradient over the measured updates, and all that cannot act."""
    parts, terms = (_shares([each[kind] for each in measured]) for kind in ("parts", "terms"))
    found = unexplained(measured, objective, updates_per_rollout)
    inactive = {**_known(objective, updates_per_rollout), **found}
    return GradientRecord(updates=len(measured), parts=parts, terms=terms, inactive=inactive)


def unexplained(measured: Sequence[Measured], objective: Objective, updates_per_rollout: int) -> dict[str, str]:
    """Parts, terms and models without any gradient in the measured updates that the objective itself does not name.

    Returns:
        Name -> the reason as a clause.
    """
    if not measured:
        return {}
    count = f"the first {len(measured)} update{'s' * (len(measured) > 1)}"
    parts, terms = (_dead([each[kind] for each in measured]) for kind in ("parts", "terms"))
    found = dict.fromkeys(parts, f"this part of the loss had no gradient in {count}")
    found |= {term: f"the loss did not depend on this term in {count}" for term in terms if term not in STOCK}
    for model in measured[0]["models"]:
        if all(each["models"][model] <= DEAD * sum(each["terms"].values()) for each in measured):
            found[model] = f"the loss did not depend on its velocity in {count}, but it costs model evaluations"
    known = _known(objective, updates_per_rollout)
    return {name: reason for name, reason in found.items() if name not in known}


def _known(objective: Objective, updates_per_rollout: int) -> dict[str, str]:
    settings, parts = objective.ineffective_settings(updates_per_rollout), objective.ineffective_parts(updates_per_rollout)
    return {**settings, **parts}


@torch.no_grad()
def _dependent_terms(objective: Objective, forest: RolloutForest, update: int) -> dict[str, set[str]]:
    """For the policy and each other model that the objective needs: the terms that change with its velocity.

    The terms of a few rows are computed from made-up velocities.
    """
    rows: Any = objective.rows(forest, update)
    few, needs = rows.part(0, min(ROWS, len(rows))), objective.needs
    offsets = {POLICY: 0.0}
    if needs.reference:
        offsets["reference"] = 0.25
    if needs.behaviour:
        offsets["behaviour policy"] = 0.5

    def terms(moved: str | None) -> Terms:
        made_up = torch.sin(torch.arange(few.x.numel(), device=few.x.device, dtype=torch.float32)).view(few.x.shape)
        velocity = {model: made_up + offset + (model == moved) for model, offset in offsets.items()}
        given = velocity[POLICY], velocity.get("reference"), velocity.get("behaviour policy")
        return objective.terms(few, Velocities(*given))

    base = terms(None)
    return {model: _changed(base, terms(model)) for model in offsets}


def _changed(first: Terms, second: Terms) -> set[str]:
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def _gradient(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Term -> the loss's gradient with respect to it."""
    inputs = list(leaves.values())
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _total(gradients: Iterable[Tensor]) -> float:
    """The norm over all terms."""
    return sum(float(gradient.norm()) ** 2 for gradient in gradients) ** 0.5


def _shares(measured: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """The mean share of each name over updates; an update without any gradient gives no name a share."""
    shares = [{name: norm / (sum(norms.values()) or 1.0) for name, norm in norms.items()} for norms in measured]
    names = dict.fromkeys(name for each in shares for name in each)
    return {name: sum(each.get(name, 0.0) for each in shares) / len(shares) for name in names}


def _dead(measured: Sequence[Mapping[str, float]]) -> set[str]:
    """The names whose share is at most `DEAD` in each update."""
    names = {name for norms in measured for name in norms}
    return {name for name in names if all(norms.get(name, 0.0) <= DEAD * sum(norms.values()) for norms in measured)}
