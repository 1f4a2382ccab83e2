"""Back-propagates an objective through the model, with memory that does not depend on the number of rollouts.

Gradient caching: the terms are computed in micro-batches without a graph; autograd gives d(loss)/d(terms) on these small
tensors; each micro-batch is then evaluated again with a graph and receives its part of that gradient. The result is the
exact gradient. Where all rows fit in one micro-batch, it is a plain single pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignbench.backbone import Backbone, holding
from alignbench.errors import NonFiniteError, RunError
from alignbench.executor import predict
from alignbench.forest import RolloutForest
from alignbench.objective import Objective
from alignbench.terms import Rows, Terms, Velocities

RATIO_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""How far the importance ratio may be from 1 on the first update after a rollout."""


@dataclass(frozen=True)
class Backward:
    """What one backward pass found.

    Attributes:
        loss: the objective's value before the update.
        terms: all terms, detached, before the update.
        rows: distinct model inputs that the policy was asked about.
        forward_rows: rows that were evaluated, counting twice those that gradient caching evaluates twice, and those of
            the reference and of the old policy.
    """

    loss: float
    terms: Terms
    rows: int
    forward_rows: int


def backward(
    policy: Backbone,
    objective: Objective,
    forest: RolloutForest,
    *,
    update: int = 0,
    micro_batch: int | None = None,
    old: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
) -> Backward:
    """Adds d(loss)/d(parameters) to the `.grad` of the policy's and the objective's parameters.

    Where the objective finds nothing to learn from (no rows), nothing is added and the loss is 0.

    Args:
        forest: with rewards.
        update: how many updates this rollout has already served.
        micro_batch: at most this many rows in one model call; None for all in one.
        old: the policy's parameters at the rollout; None while they have not changed since.
        reference: the parameters of a reference that has been refreshed; None for the base model.

    Raises:
        UserError: the objective needs stochastic steps and the plan has none.
        NonFiniteError: naming the term or loss that is NaN or infinite.
        RunError: the loss is not one number, or has no gradient.
    """
    rows = objective.rows(forest, update)
    asked = len(rows) if rows.known is None else int((~rows.known[0]).sum())
    if asked == 0:
        return Backward(0.0, {}, 0, 0)
    count = len(rows)
    conditioning = policy.encode(forest.prompts)
    size = min(micro_batch or count, count)
    parts = [rows.part(i, min(i + size, count)) for i in range(0, count, size)]

    def ask(part: Rows) -> Tensor:
        return predict(policy, part.x, part.sigma, conditioning, part.group)

    def ask_policy(part: Rows) -> Tensor:
        if part.known is None:
            return ask(part)
        keeps, velocity = part.known
        wanted = (~keeps).nonzero()[:, 0]
        if len(wanted) == 0:
            return velocity
        answer = predict(policy, part.x[wanted], part.sigma[wanted], conditioning, part.group[wanted])
        return velocity.index_copy(0, wanted, answer.float())

    references: list[Tensor | None] = [None] * len(parts)
    olds: list[Tensor | None] = [None] * len(parts)
    with torch.no_grad():
        if objective.needs.reference:
            with policy.reference() if reference is None else holding(list(policy.parameters()), reference):
                references = [ask(part) for part in parts]
        if objective.needs.old and old is not None:
            with holding(list(policy.parameters()), old):
                olds = [ask(part) for part in parts]
    other_rows = count * (objective.needs.reference + (objective.needs.old and old is not None))

    def terms_of(i: int) -> Terms:
        velocity = ask_policy(parts[i])
        before = velocity.detach() if objective.needs.old and old is None else olds[i]
        return objective.terms(parts[i], Velocities(velocity, references[i], before))

    if len(parts) == 1:
        terms = terms_of(0)
        _check_finite(terms)
        loss = objective.loss(terms, forest)
        _check_loss(loss, objective)
        loss.backward()
        detached = {name: value.detach() for name, value in terms.items()}
        return Backward(float(loss.detach()), detached, asked, asked + other_rows)

    with torch.no_grad():
        pieces = [terms_of(i) for i in range(len(parts))]
    terms = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    _check_finite(terms)
    leaves = {name: value.requires_grad_() for name, value in terms.items() if value.is_floating_point()}
    loss = objective.loss({**terms, **leaves}, forest)
    _check_loss(loss, objective)
    loss.backward()
    offsets = dict.fromkeys(leaves, 0)
    for i in range(len(parts)):
        outputs, gradients = [], []
        for name, value in terms_of(i).items():
            if name not in leaves:
                continue
            start = offsets[name]
            offsets[name] = start + len(value)
            gradient = leaves[name].grad
            if gradient is not None and value.requires_grad:
                outputs.append(value)
                gradients.append(gradient[start : offsets[name]])
        if outputs:
            torch.autograd.backward(outputs, gradients)
    detached = {name: value.detach() for name, value in terms.items()}
    return Backward(float(loss.detach()), detached, asked, 2 * asked + other_rows)


def _check_loss(loss: Tensor, objective: Objective) -> None:
    name = objective.name or type(objective).__name__
    if loss.numel() != 1:
        raise RunError(f"objective {name} gave a loss of shape {list(loss.shape)}; a loss is one number")
    if not loss.requires_grad:
        raise RunError(f"the loss of objective {name} depends on no term: there is nothing to differentiate")
    _check_finite({"loss": loss})


def _check_finite(tensors: Terms) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise NonFiniteError(f"{name} is not finite in {bad} of {value.numel()} places ({value.dtype}); the run stops here")
