"""Back-propagates an objective through the model, with memory that does not depend on the number of rollouts.

Gradient caching: the terms are computed in micro-batches without a graph; autograd gives d(loss)/d(terms) on these small
tensors; each micro-batch is then evaluated again with a graph and receives its part of that gradient. The result is the
exact gradient. Where all rows fit in one micro-batch the graph is kept, and no row is evaluated twice. Several processes are
but more micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignbench.backbone import Backbone, temporarily_set
from alignbench.errors import NonFiniteError, RunError
from alignbench.objective import Objective
from alignbench.rollouts.executor import predict
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Rows, Terms, Velocities
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, is_sharded

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
            the reference and of the behaviour policy.
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
    behaviour: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Backward:
    """Adds d(loss)/d(parameters) to the `.grad` of the policy's and the objective's parameters.

    Where the objective finds nothing to learn from (no rows), nothing is added and the loss is 0.

    Args:
        forest: with rewards.
        update: how many updates this rollout has already served.
        micro_batch: at most this many rows in one model call; None for all in one.
        behaviour: the policy's parameters at the rollout; None while they have not changed since.
        reference: the parameters of a reference that has been refreshed; None for the base model.
        processes: those that share the rows. All have the same forest, and get the same gradients and terms.

    Raises:
        UserError: the objective needs stochastic steps and the plan has none.
        NonFiniteError: naming the term or loss that is NaN or infinite.
        RunError: the loss is not one number, or has no gradient.
    """
    forest.update = update
    rows = objective.rows(forest, update)
    asked = len(rows) if rows.reused is None else int((~rows.reused[0]).sum())
    if asked == 0:
        return Backward(0.0, {}, 0, 0)
    conditioning = policy.encode(forest.prompts)
    if not rows.guided:
        conditioning = policy.without_guidance(conditioning)
    parts = _parts(rows, micro_batch, processes)
    single_pass = len(parts) == 1  # then its graph is kept; of several calls each is made anew on the way back

    def ask(part: Rows) -> Tensor:
        return predict(policy, part.x, part.sigma, conditioning, part.group)

    def ask_policy(part: Rows) -> Tensor:
        if part.reused is None:
            return ask(part)
        keeps, velocity = part.reused
        wanted = (~keeps).nonzero()[:, 0]
        if len(wanted) == 0 and not processes.sharded:
            return velocity
        answer = predict(policy, part.x[wanted], part.sigma[wanted], conditioning, part.group[wanted])
        return velocity.index_copy(0, wanted, answer.float())

    def ask_others() -> tuple[list[Tensor | None], list[Tensor | None]]:
        references: list[Tensor | None] = [None] * len(parts)
        behaviours: list[Tensor | None] = [None] * len(parts)
        with torch.no_grad():
            if objective.needs.reference:
                with policy.reference() if reference is None else temporarily_set(list(policy.parameters()), reference):
                    references = [ask(part) for part in parts]
            if asks_behaviour:
                with temporarily_set(list(policy.parameters()), behaviour or []):
                    behaviours = [ask(part) for part in parts]
        return references, behaviours

    asks_behaviour = objective.needs.behaviour and behaviour is not None
    references, behaviours = processes.on_all_ranks(ask_others, calls_model=True)
    other_rows = len(rows) * (objective.needs.reference + asks_behaviour)

    def terms_of(i: int) -> Terms:
        velocity = ask_policy(parts[i])
        before = velocity.detach() if objective.needs.behaviour and behaviour is None else behaviours[i]
        return objective.terms(parts[i], Velocities(velocity, references[i], before))

    def first_pass() -> list[Terms]:
        with torch.set_grad_enabled(single_pass):
            return [terms_of(i) for i in range(len(parts))]

    pieces = processes.on_all_ranks(first_pass, calls_model=True)
    terms: Terms = {}
    before_here: dict[str, int] = {}
    for name in pieces[0]:
        gathered = processes.all_gather(torch.cat([piece[name].detach() for piece in pieces]))
        before_here[name] = sum(len(values) for values in gathered[: processes.rank])
        terms[name] = torch.cat(gathered)
    _check_finite(terms)

    leaves = {name: value.detach().requires_grad_() for name, value in terms.items() if value.is_floating_point()}
    own = [p for p in objective.parameters() if p.requires_grad]
    loss = objective.loss({**terms, **leaves}, forest)
    _check_loss(loss, objective)
    gradients = torch.autograd.grad(loss, [*leaves.values(), *own], allow_unused=True)
    of_terms = dict(zip(leaves, gradients, strict=False))
    if processes.is_rank_zero:  # the loss is the same in all, and gradients are added up
        for parameter, gradient in zip(own, gradients[len(leaves) :], strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def recompute_and_backward() -> None:
        places = dict(before_here)
        for i in range(len(parts)):
            outputs, sent = [], []
            for name, value in (pieces[i] if single_pass else terms_of(i)).items():
                here = slice(places[name], places[name] + len(value))
                places[name] = here.stop
                gradient = of_terms.get(name)
                if gradient is not None and value.requires_grad:
                    outputs.append(value)
                    sent.append(gradient[here])
            if outputs:
                torch.autograd.backward(outputs, sent)

    processes.on_all_ranks(recompute_and_backward, calls_model=True)
    _add_up([*policy.parameters(), *own], processes)
    return Backward(float(loss.detach()), terms, asked, asked * (1 if single_pass else 2) + other_rows)


def _parts(rows: Rows, micro_batch: int | None, processes: Processes) -> list[Rows]:
    """This process's rows in micro-batches; each process has as many, some of which may be empty."""
    bounds = [len(rows) * rank // processes.count for rank in range(processes.count + 1)]
    longest = max(stop - start for start, stop in pairwise(bounds))
    size = min(micro_batch or longest, longest)
    start, stop = bounds[processes.rank], bounds[processes.rank + 1]
    return [rows.part(min(start + i, stop), min(start + i + size, stop)) for i in range(0, longest, size)]


def _add_up(parameters: Sequence[Tensor], processes: Processes) -> None:
    """Makes each gradient the sum over processes; one that none of them has stays None. Where weights are spread, it is."""
    if processes.count == 1:
        return
    parameters = [p for p in parameters if not is_sharded(p)]
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=processes.device)
    processes.all_reduce_sum_([has])
    gradients = []
    for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
        if somewhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    processes.all_reduce_sum_(gradients)


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
