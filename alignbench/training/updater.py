"""Updating: all optimizer steps on one forest, and the weights that follow the policy (EMA, behaviour policy, reference)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.errors import NonFiniteError
from alignbench.keepers.data_term import Data, DataTerm
from alignbench.objective import Objective
from alignbench.records.record import Budget
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan
from alignbench.rollouts.terms import Terms, log_ratio
from alignbench.runtime.micro_batch import MicroBatch
from alignbench.runtime.processes import Processes, full_tensor, is_sharded
from alignbench.training import dead_terms, engine
from alignbench.training.tensors import EMA, TrainedTensors


class Updater:
    """Takes the optimizer steps of each rollout; owns every tensor that a training changes.

    Attributes:
        parameters: the parameters that the optimizer changes: the policy's and the objective's own.
        tensors: these parameters and all tensors that follow them, as a checkpoint holds them.
        ratio_deviation: the largest |ratio - 1| of any first update after a rollout.
        gradients: what was measured of the parts of the loss, for each update of the first iterations that had a gradient.
        data: where the images of the data term come from; None without that keeper.
        partially_updated: whether an iteration failed during its updates; no checkpoint is written until one is restored.
    """

    def __init__(
        self, config: RunConfig, policy: Backbone, objective: Objective, processes: Processes, micro_batch: MicroBatch
    ) -> None:
        self.config, self.policy, self.objective = config, policy, objective
        self.processes, self.micro_batch = processes, micro_batch
        objective.prepare(policy.latent_shape, policy.device)
        self.parameters: list[nn.Parameter] = [*policy.parameters(), *objective.parameters()]
        o = config.optimizer
        # AdamW takes no list in which some tensors are sharded and some are not.
        alike = [[p for p in self.parameters if is_sharded(p) == sharded] for sharded in (True, False)]
        parameter_groups = [{"params": parameters} for parameters in alike if parameters]
        optimizer = torch.optim.AdamW(parameter_groups, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        ema = EMA(list(policy.parameters()), config.ema.decay, config.ema.every) if config.ema else None
        behaviour = self.policy_values() if objective.needs.behaviour_is_ema else None
        weight = config.keepers.data
        self.data = Data(config.keepers, policy, config.seed) if weight else None
        self.data_term = DataTerm(weight)
        self.tensors = TrainedTensors(policy.trainable(), optimizer, ema, objective, behaviour=behaviour)
        self.ratio_deviation = 0.0
        self.gradients: list[dead_terms.Measured] = []
        self.partially_updated = False

    def policy_values(self) -> list[Tensor]:
        """A copy of the policy's parameters as they are now."""
        return [p.detach().clone() for p in self.policy.parameters()]

    def trains_on_rollout_rows(self, plan: Plan, groups: int) -> bool:
        """Whether the first update evaluates the weights of the rollout at all its scored rows, so that their graph serves."""
        return (
            self.processes.count == 1
            and not self.processes.sharded
            and self.objective.needs.policy_draws_rollouts
            and self.tensors.reference is None  # the weights of a refreshed reference are written over those of the graph
            and self.objective.needs.training
            and self.objective.replays
            and self.objective.trained_leaves(planned_forest(plan, groups)) is None
        )

    def update(self, forest: RolloutForest, progress: Callable[[], float], budget: Budget) -> dict[str, float]:
        """Takes all optimizer steps of one rollout.

        Args:
            progress: returns the progress of the training, from 0 to 1, for the schedule of the learning rate.
            budget: rows and optimizer steps are added to it.

        Returns:
            Numbers for the iteration's row.

        Raises:
            NonFiniteError: a term, a gradient or a weight is not finite.
        """
        numbers: dict[str, float] = {}
        first_terms: list[Terms] = []
        largest = deviation = 0.0
        updates, behaviour = self.config.updates_per_rollout, self.tensors.behaviour
        if behaviour is None and self.objective.needs.behaviour and updates > 1:
            behaviour = self.policy_values()
        data = self._data(forest, budget)
        for update in range(updates):
            has_moved = update > 0 or self.tensors.behaviour is not None
            result = self._backward(forest, update, behaviour if has_moved else None)
            budget.model_rows_train += result.forward_rows
            budget.replay_rows += result.rows
            if data is not None:
                of_data = self._add_data_term(data, update)
                budget.model_rows_train += of_data.forward_rows
                numbers |= {"loss_data": of_data.loss}
            if "log_prob" in result.terms and len(result.terms["log_prob"]):
                deviation = float(torch.expm1(log_ratio(result.terms, forest)).abs().max())
                largest = max(largest, deviation)
                if update == 0:
                    self.ratio_deviation = max(self.ratio_deviation, deviation)
            numbers |= self._step(forest.iteration, progress(), budget) | {"loss": result.loss}
            if forest.iteration < dead_terms.ITERATIONS:
                first_terms.append(result.terms)
            if update == 0:
                numbers |= {"ratio_abs_dev_first": deviation, **self.objective.diagnostics(result.terms, forest)}
        numbers |= self._follow(budget)
        self._measure_parts(first_terms, forest)
        return numbers | {"ratio_abs_dev_max": largest, "off_policy_share": (updates - 1) / updates}

    def _data(self, forest: RolloutForest, budget: Budget) -> RolloutForest | None:
        """The data that a keeper trains on beside the rollout, if there is one."""
        if self.data is None:
            return None
        budget.model_rows_rollout += self.data.model_rows(forest)
        make = self.data.forest
        rows = self.config.keepers.data_images
        return self.micro_batch.fit(
            lambda limit: self.processes.on_all_ranks(lambda: make(forest, limit), calls_model=True), lambda: rows
        )

    def _add_data_term(self, data: RolloutForest, update: int) -> engine.Backward:
        """Adds the gradient of the data term to that of the objective."""
        kept = [p.grad for p in self.parameters]

        def within(micro_batch: int | None) -> engine.Backward:
            for parameter in self.parameters:  # what other ranks have added to a gradient is not added twice
                parameter.grad = None
            return engine.backward(
                self.policy, self.data_term, data, update=update, micro_batch=micro_batch, processes=self.processes
            )

        result = self.micro_batch.fit(within, lambda: len(data.leaves))
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return result

    def _measure_parts(self, terms_of_updates: Sequence[Terms], forest: RolloutForest) -> None:
        """Measures the parts of the loss in the updates of one of the first rollouts; the model is not called."""
        measured = [dead_terms.measure(self.objective, terms, forest, i) for i, terms in enumerate(terms_of_updates)]
        self.gradients += [each for each in measured if each is not None]

    def _follow(self, budget: Budget) -> dict[str, float]:
        """Moves a behaviour policy that is a moving average towards the policy."""
        average = self.tensors.behaviour
        if average is None:
            return {}
        decay = self.objective.behaviour_ema_decay(budget.optimizer_steps)
        with torch.no_grad():
            for before, now in zip(average, self.policy.parameters(), strict=True):
                before.lerp_(now, 1 - decay)
        return {"behaviour_ema_decay": decay}

    def _backward(self, forest: RolloutForest, update: int, behaviour: list[Tensor] | None) -> engine.Backward:
        def within(micro_batch: int | None) -> engine.Backward:
            self.tensors.optimizer.zero_grad(set_to_none=True)
            return engine.backward(
                self.policy,
                self.objective,
                forest,
                update=update,
                on_policy=update == 0 and self.objective.needs.policy_draws_rollouts,
                micro_batch=micro_batch,
                behaviour=behaviour,
                reference=self.tensors.reference,
                processes=self.processes,
            )

        return self.micro_batch.fit(within, lambda: len(self.objective.rows(forest, update)))

    def _step(self, iteration: int, progress: float, budget: Budget) -> dict[str, float]:
        """Takes one optimizer step; returns the norm of the gradient, and how far the weights moved."""
        o, optimizer = self.config.optimizer, self.tensors.optimizer
        factor = 0.1 + 0.45 * (1 + np.cos(np.pi * progress)) if o.schedule == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = o.lr * float(factor)
        norm = _clip(self.parameters, o.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient is not finite in iteration {iteration} ({self.policy.dtype})")
        before = [p.detach().clone() for p in self.parameters]
        self.partially_updated = True  # until the iteration is complete
        optimizer.step()
        budget.optimizer_steps += 1
        with torch.no_grad():
            squares = [full_tensor((p - b).square().sum()) for p, b in zip(self.parameters, before, strict=True)]
            moved = torch.stack(squares).sum().sqrt()
            finite = torch.stack([_all_finite(p) for p in self.parameters]).all()
        if not bool(finite):
            raise NonFiniteError(
                f"the weights are not finite after the update of iteration {iteration}; lower optimizer.lr. "
                "They were not saved: the last checkpoint is from before"
            )
        if self.tensors.ema:
            self.tensors.ema.update(budget.optimizer_steps)
        return {"grad_norm": float(norm), "policy_update_norm": float(moved), "lr": o.lr * float(factor)}


def _clip(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scales the gradients down to the norm `largest` if theirs is larger; returns the norm before that."""
    if not any(map(is_sharded, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.stack([full_tensor(torch.linalg.vector_norm(g)) for g in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(float((largest / (norm + 1e-6)).clamp(max=1.0)))
    return norm


def _all_finite(parameter: Tensor) -> Tensor:
    """Whether all values are finite, a bool tensor; of a sharded parameter the sum is checked, which all ranks can see."""
    return torch.isfinite(full_tensor(parameter.sum()) if is_sharded(parameter) else parameter).all()
