"""Back-propagates an objective through the model, with memory that does not depend on the number of rollouts.

Gradient caching: the terms of all rows are small tensors. From them autograd gives d(loss)/d(terms); each micro-batch is then
evaluated with a graph and receives its part of that gradient. The result is the exact gradient. How the terms are known decides
what a row costs:

- The rollout kept the graph of its scored rows (`RolloutForest.live_velocity`): the first update only goes back.
- All rows fit in one micro-batch: its graph is kept, one forward and backward pass.
- The first update after a rollout: the policy is the one that rolled out, so the terms follow from the velocities that the
  forest keeps, and each micro-batch needs one forward and backward pass.
- A separable loss (`Objective.separable`): d(loss)/d(a micro-batch's terms) needs no other rows' terms, one pass as well.
- Otherwise each micro-batch is evaluated twice: without a graph for its terms, and with one for the backward pass.

To the engine, extra ranks are extra micro-batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignbench.backbone import Backbone, temporarily_set
from alignbench.errors import NonFiniteError, RunError
from alignbench.objective import Objective
from alignbench.rollouts.executor import predict
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import EdgeRows, Rows, Terms, Velocities
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, is_sharded

RATIO_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""How far the importance ratio may be from 1 on the first update after a rollout."""


@dataclass(frozen=True)
class Backward:
    """The result of one backward pass.

    Attributes:
        loss: the objective's value before the update.
        terms: all terms, detached, before the update.
        rows: distinct model inputs at which the policy was evaluated.
        forward_rows: rows that were evaluated, counting twice those that are evaluated twice, and those of the reference and
            of the behaviour policy. Rows whose graph the rollout kept count once, so that a budget does not depend on that.
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
    on_policy: bool = False,
    micro_batch: int | None = None,
    behaviour: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Backward:
    """Adds d(loss)/d(parameters) to the `.grad` of the policy's and the objective's parameters.

    If the objective has no rows to train on, nothing is added and the loss is 0.

    Args:
        policy: the backbone with the weights to train.
        objective: the loss and the model inputs that it needs.
        forest: the rollout, with rewards.
        update: how many updates this rollout has already served.
        on_policy: whether the policy has the weights that drew the rollout, so that the terms follow from the rollout.
        micro_batch: the most rows in one model call; None for all rows in one call.
        behaviour: the policy's parameters at the rollout; None while they have not changed since.
        reference: the parameters of a reference that has been refreshed; None for the base model.
        processes: the ranks that share the rows. All have the same forest, and get the same gradients and terms.

    Raises:
        UserError: the objective needs stochastic steps and the plan has none.
        NonFiniteError: naming the term or loss that is NaN or infinite.
        RunError: the loss is not one number, or has no gradient.
    """
    forest.update = update
    live_velocity = forest.take_live_velocity()
    rows = objective.rows(forest, update)
    if not (on_policy and objective.replays and rows.reused is None and len(rows) <= (micro_batch or len(rows))):
        live_velocity = None
    row_count = len(rows) if rows.reused is None else int((~rows.reused[0]).sum())
    if row_count == 0:
        return Backward(0.0, {}, 0, 0)
    work = _Pass(policy, objective, forest, rows, micro_batch, behaviour, reference, processes, live_velocity)
    if len(work.parts) == 1:
        loss, terms = work.with_kept_graph()
        passes = 1
    elif on_policy and objective.replays:
        loss, terms = work.from_the_rollout()
        passes = 1
    elif objective.separable and objective.replays:
        loss, terms = work.part_by_part()
        passes = 1
    else:
        loss, terms = work.in_two_passes()
        passes = 2
    _sum_over_ranks([*policy.parameters(), *work.own_parameters], processes)
    return Backward(loss, terms, row_count, passes * row_count + work.other_rows)


class _Pass:
    """The rows of one backward pass in micro-batches, with the velocities of the reference and the behaviour policy.

    Attributes:
        parts: this rank's micro-batches.
        own_parameters: the trained parameters of the objective.
        live_velocity: the policy's velocities at all rows with the graph that the rollout kept; None evaluates the policy.
        other_rows: how many rows the reference and the behaviour policy are evaluated at.
    """

    def __init__(
        self,
        policy: Backbone,
        objective: Objective,
        forest: RolloutForest,
        rows: Rows,
        micro_batch: int | None,
        behaviour: Sequence[Tensor] | None,
        reference: Sequence[Tensor] | None,
        processes: Processes,
        live_velocity: Tensor | None,
    ) -> None:
        self.policy, self.objective, self.forest, self.processes = policy, objective, forest, processes
        self.live_velocity = live_velocity
        conditioning = policy.encode(forest.prompts)
        self.conditioning = conditioning if rows.guided else policy.without_guidance(conditioning)
        self.parts = _parts(rows, micro_batch, processes)
        self.own_parameters = [p for p in objective.parameters() if p.requires_grad]
        self.behaviour_moved = objective.needs.behaviour and behaviour is not None
        self.other_rows = len(rows) * (objective.needs.reference + self.behaviour_moved)
        self.references, self.behaviours = processes.on_all_ranks(lambda: self._others(behaviour, reference), calls_model=True)

    def _others(
        self, behaviour: Sequence[Tensor] | None, reference: Sequence[Tensor] | None
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Velocities of the reference and of the behaviour policy for each micro-batch, as far as the objective needs them."""
        references: list[Tensor | None] = [None] * len(self.parts)
        behaviours: list[Tensor | None] = [None] * len(self.parts)
        parameters = list(self.policy.parameters())
        with torch.no_grad():
            if self.objective.needs.reference:
                with self.policy.reference() if reference is None else temporarily_set(parameters, reference):
                    references = [self._velocity(part) for part in self.parts]
            if self.behaviour_moved:
                with temporarily_set(parameters, behaviour or []):
                    behaviours = [self._velocity(part) for part in self.parts]
        return references, behaviours

    def _velocity(self, part: Rows) -> Tensor:
        if self.live_velocity is None:
            return predict(self.policy, part.x, part.sigma, self.conditioning, part.group)
        # In the calls of the rollout, so that a model with the policy's weights has the bits of `live_velocity`.
        calls = torch.unique_consecutive(self.forest.row_step, return_counts=True)[1].tolist()
        inputs = zip(*(each.split(calls) for each in (part.x, part.sigma, part.group)), strict=True)
        return torch.cat([predict(self.policy, x, sigma, self.conditioning, group) for x, sigma, group in inputs])

    def _policy_velocity(self, part: Rows) -> Tensor:
        """The policy's velocity; rows that are not trained on keep that of the rollout."""
        if part.reused is None:
            return self._velocity(part)
        keeps, velocity = part.reused
        trained = (~keeps).nonzero()[:, 0]
        if len(trained) == 0 and not self.processes.sharded:
            return velocity
        predicted = predict(self.policy, part.x[trained], part.sigma[trained], self.conditioning, part.group[trained])
        return velocity.index_copy(0, trained, predicted.float())

    def _terms(self, i: int, velocity: Tensor | None = None) -> Terms:
        """The terms of micro-batch i from the policy's velocity, or from the given one."""
        part = self.parts[i]
        of_policy = self._policy_velocity(part) if velocity is None else velocity
        unmoved = self.objective.needs.behaviour and not self.behaviour_moved
        of_behaviour = of_policy.detach() if unmoved else self.behaviours[i]
        return self.objective.terms(part, Velocities(of_policy, self.references[i], of_behaviour))

    @torch.no_grad()
    def _terms_of_the_rollout(self) -> list[Terms]:
        """Terms of each micro-batch from the velocities that the forest keeps; the model is not called."""
        pieces = []
        for i, part in enumerate(self.parts):
            assert isinstance(part, EdgeRows)  # the objective replays the rollout's own rows
            pieces.append(self._terms(i, self.forest.row_velocity[part.start : part.stop]))
        return pieces

    def _gathered(self, pieces: Sequence[Terms]) -> tuple[Terms, dict[str, int]]:
        """All terms of all ranks, detached, and the place of this rank's first value of each term."""
        terms: Terms = {}
        first: dict[str, int] = {}
        for name in pieces[0]:
            of_ranks = self.processes.all_gather(torch.cat([piece[name].detach() for piece in pieces]))
            first[name] = sum(len(values) for values in of_ranks[: self.processes.rank])
            terms[name] = torch.cat(of_ranks)
        _check_finite(terms)
        return terms, first

    def _loss(self, terms: Terms, *, own: bool = True) -> tuple[float, dict[str, Tensor | None]]:
        """The loss and its gradient with respect to each term.

        Args:
            own: whether its gradient with respect to the objective's own parameters is added to them.
        """
        own_parameters = self.own_parameters if own else []
        leaves = {name: value.detach().requires_grad_() for name, value in terms.items() if value.is_floating_point()}
        loss = self.objective.loss({**terms, **leaves}, self.forest)
        _check_loss(loss, self.objective)
        gradients = torch.autograd.grad(loss, [*leaves.values(), *own_parameters], allow_unused=True)
        if self.processes.is_rank_zero:  # the loss is the same on all ranks, and gradients are summed over them
            for parameter, gradient in zip(own_parameters, gradients[len(leaves) :], strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return float(loss.detach()), dict(zip(leaves, gradients, strict=False))

    @staticmethod
    def _send_back(piece: Terms, gradients: Mapping[str, Tensor | None], places: dict[str, int]) -> None:
        """Back-propagates a micro-batch's part of d(loss)/d(terms); `places` moves on to the next micro-batch."""
        outputs, sent = [], []
        for name, value in piece.items():
            here = slice(places[name], places[name] + len(value))
            places[name] = here.stop
            gradient = gradients.get(name)
            if gradient is not None and value.requires_grad:
                outputs.append(value)
                sent.append(gradient[here])
        if outputs:
            torch.autograd.backward(outputs, sent)

    def _recompute_and_backward(self, gradients: Mapping[str, Tensor | None], first: Mapping[str, int]) -> list[Terms]:
        """Evaluates each micro-batch with a graph and back-propagates its gradient; returns its detached terms."""
        places, pieces = dict(first), []
        for i in range(len(self.parts)):
            piece = self._terms(i)
            self._send_back(piece, gradients, places)
            pieces.append({name: value.detach() for name, value in piece.items()})
        return pieces

    def with_kept_graph(self) -> tuple[float, Terms]:
        """The pass for a single micro-batch: its graph is kept from the terms, or from the rollout, to the backward pass."""
        with torch.enable_grad():
            piece = self.processes.on_all_ranks(lambda: self._terms(0, self.live_velocity), calls_model=True)
        terms, first = self._gathered([piece])
        loss, gradients = self._loss(terms)
        self.processes.on_all_ranks(lambda: self._send_back(piece, gradients, dict(first)), calls_model=True)
        return loss, terms

    def in_two_passes(self) -> tuple[float, Terms]:
        """The general pass: each micro-batch is evaluated without a graph for its terms, and again with one."""

        def without_graph() -> list[Terms]:
            with torch.no_grad():
                return [self._terms(i) for i in range(len(self.parts))]

        terms, first = self._gathered(self.processes.on_all_ranks(without_graph, calls_model=True))
        loss, gradients = self._loss(terms)
        self.processes.on_all_ranks(lambda: self._recompute_and_backward(gradients, first), calls_model=True)
        return loss, terms

    def from_the_rollout(self) -> tuple[float, Terms]:
        """The pass on policy: the rollout's velocities give d(loss)/d(terms), and each micro-batch is evaluated once.

        The returned terms are those of that evaluation, so that an importance ratio other than 1 shows.
        """
        terms, first = self._gathered(self.processes.on_all_ranks(self._terms_of_the_rollout))
        loss, gradients = self._loss(terms)
        pieces = self.processes.on_all_ranks(lambda: self._recompute_and_backward(gradients, first), calls_model=True)
        return loss, self._gathered(pieces)[0]

    def part_by_part(self) -> tuple[float, Terms]:
        """The pass for a separable loss: each micro-batch is back-propagated as soon as its own terms are known.

        The rollout's terms take the place of those of other rows.
        """
        terms, first = self._gathered(self.processes.on_all_ranks(self._terms_of_the_rollout))

        def one_pass() -> list[Terms]:
            places, pieces = dict(first), []
            for i in range(len(self.parts)):
                piece = self._terms(i)
                stand_in = dict(terms)
                for name, value in piece.items():
                    stand_in[name] = terms[name].clone()
                    stand_in[name][places[name] : places[name] + len(value)] = value.detach()
                _check_finite({name: value.detach() for name, value in piece.items()})
                self._send_back(piece, self._loss(stand_in, own=False)[1], places)
                pieces.append({name: value.detach() for name, value in piece.items()})
            return pieces

        all_terms, _ = self._gathered(self.processes.on_all_ranks(one_pass, calls_model=True))
        return self._loss(all_terms)[0], all_terms


def _parts(rows: Rows, micro_batch: int | None, processes: Processes) -> list[Rows]:
    """This rank's rows in micro-batches; all ranks have the same number of them, some of which may be empty."""
    bounds = [len(rows) * rank // processes.count for rank in range(processes.count + 1)]
    longest = max(stop - start for start, stop in pairwise(bounds))
    size = min(micro_batch or longest, longest)
    start, stop = bounds[processes.rank], bounds[processes.rank + 1]
    return [rows.part(min(start + i, stop), min(start + i + size, stop)) for i in range(0, longest, size)]


def _sum_over_ranks(parameters: Sequence[Tensor], processes: Processes) -> None:
    """Makes each gradient its sum over ranks; one that no rank has stays None. Those of sharded weights are summed already."""
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
