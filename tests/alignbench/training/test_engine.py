"""The engine's gradients against plain autograd over every (leaf, step) pair, with losses written a second time."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignbench import Objective, Plan, RolloutForest, Settings, Step, load_objective, load_sampler, registry, rollout
from alignbench.errors import NonFiniteError, RunError, UserError
from alignbench.rollouts.terms import EdgeRows, Terms, Velocities, log_ratio
from alignbench.training.engine import backward
from tests.support.by_hand import LeafValues, grpo_loss, leaf_values, tmpo_loss
from tests.support.replays import MICRO_BATCHES, REWARDS, ROUNDING, TRAINING, by_autograd, check, drawn, plan_of
from tests.support.toys import LATENT, MIXED, PROMPTS, ToyBackbone

SAMPLERS = ("independent", "fixed_tree", "dynamic_tree", "trunk_tree", "granular")
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


@cache
def moved(sampler: str) -> tuple[ToyBackbone, RolloutForest, LeafValues]:
    """A policy that has moved since its rollout, and every (leaf, step) pair replayed; shared: do not change it."""
    toy, behaviour, forest = drawn(plan_of(sampler))
    return toy, forest, leaf_values(toy, behaviour, forest)


every_pair = pytest.mark.parametrize(("objective", "sampler"), list(product(TRAINING, registry.names("samplers"))))


def prepared(name: str, forest: RolloutForest) -> Objective:
    """With a clip that some ratios are beyond, and parameters of its own that are not all zero."""
    fields = registry.find("objectives", name, Objective).Settings.model_fields
    settings = {"clip": 0.01} if "clip" in fields else {}
    if name == "dpo":
        settings = {"beta": 5}  # it multiplies the rounding of the errors
    objective = load_objective(name, **settings)
    torch.manual_seed(0)
    objective.prepare(LATENT, torch.device("cpu"))
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.3)
    objective.observe(forest)
    return objective


@every_pair
def test_the_gradient_of_every_pair_is_the_plain_one_at_any_micro_batch(objective: str, sampler: str) -> None:
    toy, behaviour, forest = drawn(plan_of(sampler))
    made = prepared(objective, forest)
    rows = made.rows(forest, 1)
    condition = toy.encode(forest.prompts)[rows.group]
    policy, reference, old = (net(rows.x, rows.sigma, condition) for net in (toy.net, toy.frozen, behaviour))
    loss = made.loss(made.terms(rows, Velocities(policy, reference.detach(), old.detach())), forest)
    gradients = torch.autograd.grad(loss, [*toy.parameters(), *made.parameters()])
    gradient = torch.cat([g.flatten() for g in gradients])
    check(toy, made, forest, loss.item(), gradient, update=1, old=list(behaviour.parameters()))


@every_pair
def test_every_pair_starts_at_ratio_one_and_replays_each_distinct_parent_once(objective: str, sampler: str) -> None:
    plan = plan_of(sampler)
    toy, _, forest = drawn(plan, move=0)
    made = prepared(objective, forest)
    rows = made.rows(forest, 0)
    for micro_batch in MICRO_BATCHES:
        found = backward(toy, made, forest, micro_batch=micro_batch)
        assert found.rows == len(rows)
        if isinstance(rows, EdgeRows):
            distinct = len(torch.unique(forest.states[forest.rows], dim=0))
            assert found.rows == distinct == plan.replay_rows(2)
            assert (torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max() < 1e-5  # float32
            assert found.terms["drift_noise"].abs().max() < 1e-5


TMPO_OPTIONS = list(
    product(
        ("log_ratio", "centred", "forward_kl", "squared"),
        ("rationorm", "trajectory", "released", "none"),
        ("none", "behaviour", "frozen"),
    )
)


@every_sampler
@pytest.mark.parametrize(("advantage", "ratio", "reference"), TMPO_OPTIONS)
def test_tmpos_gradient_is_the_plain_one_at_any_micro_batch(
    sampler: str,
    advantage: str,
    ratio: str,
    reference: str,
) -> None:
    toy, forest, values = moved(sampler)
    options = {"advantage": advantage, "ratio": ratio, "reference": reference, "clip": 0.01, "temperature": 0.5}
    # beta at iteration 3 of the default warm-up: .8 + 1.2 * 3 / 150.
    expected = by_autograd(toy, tmpo_loss(values, REWARDS * forest.plan.groups, beta=0.824, **options))  # type: ignore[arg-type]
    check(toy, load_objective("tmpo", **options), forest, *expected)


@every_sampler
@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_grpos_gradient_is_the_plain_one_at_any_micro_batch(sampler: str, std: str, kl_beta: float) -> None:
    toy, forest, values = moved(sampler)
    options = {"clip": 0.01, "std": std, "kl_beta": kl_beta, "adv_clip": 1.2}
    expected = by_autograd(toy, grpo_loss(values, REWARDS * forest.plan.groups, **options))  # type: ignore[arg-type]
    check(toy, load_objective("grpo", **options), forest, *expected)


def test_the_moved_policies_above_are_partly_clipped() -> None:
    for sampler in SAMPLERS:
        _, _, values = moved(sampler)
        change = torch.exp(values.log_prob - values.old_log_prob).detach() - 1
        assert 0 < (change.abs() > 0.01).float().mean() < 1
        assert 0 < (values.drift_noise.mean(1).abs() > 0.01).float().mean() < 1


@pytest.mark.parametrize("name", ["tmpo", "grpo"])
def test_gradients_agree_for_summed_log_probs_and_mixed_step_rules(name: str) -> None:
    rewards = [[0.5, 2.0, -1.0, 0.25, 0.0, 1.0], [1.0, 0.0, 0.0, 3.5, 2.0, -1.0]]
    toy, behaviour, forest = drawn(MIXED, move=0.003, reduction="sum", rewards=rewards)
    objective = load_objective(name, **({"temperature": 20.0} if name == "tmpo" else {"clip": 0.05}))

    values = leaf_values(toy, behaviour, forest)
    losses = {
        "tmpo": tmpo_loss(values, rewards, beta=0.824, temperature=20.0),
        "grpo": grpo_loss(values, rewards, clip=0.05),
    }
    # Summed over 18 latent dimensions, terms and their rounding are as much larger.
    check(toy, objective, forest, *by_autograd(toy, losses[name]), rounding=18 * ROUNDING)


@every_sampler
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@pytest.mark.parametrize("reference", ["none", "frozen"])
def test_a_pass_evaluates_each_distinct_parent_once_and_twice_when_cut(
    sampler: str, micro_batch: int | None, reference: str
) -> None:
    plan = plan_of(sampler)
    toy, _, forest = drawn(plan)
    toy.reset_counters()
    found = backward(toy, load_objective("tmpo", reference=reference), forest, micro_batch=micro_batch)
    rows = plan.replay_rows(2)
    assert len(torch.unique(forest.states[forest.rows], dim=0)) == rows
    assert found.rows == rows
    assert found.forward_rows == toy.rows == rows * ((1 if micro_batch is None else 2) + (reference == "frozen"))
    if micro_batch is None:
        assert toy.calls == 1 + (reference == "frozen")


@pytest.mark.parametrize("name", ["tmpo", "grpo"])
def test_rows_that_are_not_trained_on_keep_the_rollouts_answer_and_give_no_gradient(name: str) -> None:
    toy, behaviour, forest = drawn(plan_of("independent"))
    forest.train_only(torch.tensor([True, False, False, True] * 2))
    assert forest.trained is not None
    trained = forest.trained[forest.edge_row[forest.leaf_edges]]
    assert trained.tolist() == [[True] * 2, [False] * 2, [False] * 2, [True] * 2] * 2
    values = leaf_values(toy, behaviour, forest)
    kept = replace(
        values,
        log_prob=torch.where(trained, values.log_prob, values.old_log_prob),
        drift_noise=torch.where(trained, values.drift_noise, 0.0),
    )
    losses = {"tmpo": tmpo_loss(kept, REWARDS, beta=0.824), "grpo": grpo_loss(kept, REWARDS, clip=0.01)}
    objective = load_objective(name, **({"clip": 0.01} if name == "grpo" else {}))
    check(toy, objective, forest, *by_autograd(toy, losses[name]))
    assert backward(toy, objective, forest).rows == 8


def test_a_3x3x3_tree_is_replayed_with_13_rows_a_group() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, load_sampler("fixed_tree").plan(0.0, None), seed=0)  # type: ignore[arg-type]
    forest.rewards = torch.arange(54.0) % 5
    assert backward(toy, load_objective("tmpo"), forest).rows == 26


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_gradients_add_up_until_they_are_cleared(micro_batch: int | None) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    objective = load_objective("tmpo")
    backward(toy, objective, forest, micro_batch=micro_batch)
    once = toy.gradient().clone()
    backward(toy, objective, forest, micro_batch=micro_batch)
    assert torch.allclose(toy.gradient(), 2 * once, rtol=1e-5, atol=ROUNDING)


def test_the_reference_keeps_no_gradient_and_the_policy_is_active_again_afterwards() -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    backward(toy, load_objective("tmpo", reference="frozen"), forest, micro_batch=3)
    assert all(p.grad is None for p in toy.frozen.parameters())
    assert toy.active is toy.net


class LearntLogZ(Objective):
    """Trajectory balance with a learnt log Z: mean (log Z + s - R)^2."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.log_z = nn.Parameter(torch.tensor(0.25))

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        residual = self.log_z + forest.path_sum(terms["log_prob"]) - forest.by_group(forest.rewards)
        return (residual**2).mean()

    def parameters(self) -> Iterable[nn.Parameter]:
        return (self.log_z,)


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@every_sampler
def test_a_learnt_scalar_of_the_objective_gets_its_gradient(sampler: str, micro_batch: int | None) -> None:
    toy, forest, values = moved(sampler)
    toy.net.zero_grad()
    objective = LearntLogZ(Settings())
    found = backward(toy, objective, forest, micro_batch=micro_batch)
    residual = (objective.log_z + values.log_prob.sum(1) - forest.rewards).detach()
    assert found.loss == pytest.approx(float((residual**2).mean()), rel=1e-5)  # float32
    assert objective.log_z.grad is not None
    assert float(objective.log_z.grad) == pytest.approx(2 * float(residual.mean()), rel=1e-5)
    _, expected = by_autograd(toy, 2 * (residual * values.log_prob.sum(1)).mean())
    assert torch.allclose(toy.gradient(), expected, rtol=1e-4, atol=1e-5)  # gradients of about 10


class LearntScale(Objective):
    """Has a parameter inside the terms: they are scaled before the loss sees them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def terms(self, rows: object, velocities: Velocities) -> Terms:
        found = super().terms(rows, velocities)
        return {"scaled": self.scale * found["log_prob"], "count": torch.ones(len(found["log_prob"]), dtype=torch.long)}

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        assert terms["count"].sum() == len(forest.old_log_prob)
        return (terms["scaled"] ** 2).sum()


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_a_parameter_inside_the_terms_gets_its_gradient_beside_whole_numbers(micro_batch: int | None) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"), move=0)
    objective = LearntScale(Settings())
    backward(toy, objective, forest, micro_batch=micro_batch)
    assert objective.scale.grad is not None
    # d/dc sum (c l)^2 = 2 c sum l^2
    assert float(objective.scale.grad) == pytest.approx(4 * float((forest.old_log_prob**2).sum()), rel=1e-4)  # float32


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_nan_in_the_weights_stops_the_update_and_names_the_term(micro_batch: int | None) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    with torch.no_grad():
        toy.net.outer.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"log_prob is not finite in 12 of 12 places \(torch.float32\)"):
        backward(toy, load_objective("tmpo"), forest, micro_batch=micro_batch)
    assert all(p.grad is None for p in toy.net.parameters())


class InfiniteLoss(Objective):
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return terms["log_prob"].sum() / 0


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_an_infinite_loss_stops_the_update(micro_batch: int | None) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        backward(toy, InfiniteLoss(Settings()), forest, micro_batch=micro_batch)
    assert all(p.grad is None for p in toy.net.parameters())


class LossOfEachGroup(Objective):
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return forest.path_sum(terms["log_prob"]).mean(1)


class Severed(Objective):
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return terms["log_prob"].detach().mean()


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_a_loss_that_is_no_number_or_has_no_gradient_is_refused_in_a_sentence(micro_batch: int | None) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    for objective, sentence in (
        (LossOfEachGroup(Settings()), r"objective LossOfEachGroup gave a loss of shape \[2\]; a loss is one number"),
        (Severed(Settings()), "the loss of objective Severed depends on no term"),
    ):
        with pytest.raises(RunError, match=sentence):
            backward(toy, objective, forest, micro_batch=micro_batch)
    assert all(p.grad is None for p in toy.net.parameters())


class Curious(Objective):
    """Remembers which update it was asked about."""

    asked: int = -1

    def rows(self, forest: RolloutForest, update: int):  # type: ignore[no-untyped-def]
        self.asked = update
        return super().rows(forest, update)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return terms["log_prob"].mean()


def test_an_objective_is_told_the_number_of_the_update() -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"))
    objective = Curious(Settings())
    backward(toy, objective, forest, update=3)
    assert objective.asked == 3


def test_a_forest_without_stochastic_steps_is_refused_in_a_sentence() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, Plan((Step(),) * 3, roots=2), seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    with pytest.raises((RunError, UserError), match="stochastic"):
        backward(toy, load_objective("tmpo"), forest)


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_while_nothing_has_changed_the_old_policys_answer_is_reused_without_gradient(
    micro_batch: int | None,
) -> None:
    toy, _, forest = drawn(plan_of("independent"), move=0)
    objective = load_objective("nft")
    gradients = []
    for old in (None, [p.detach().clone() for p in toy.parameters()]):
        toy.net.zero_grad()
        backward(toy, objective, forest, micro_batch=micro_batch, behaviour=old)
        gradients.append(toy.gradient())
    assert gradients[0].abs().max() > 1e-4
    assert torch.allclose(gradients[0], gradients[1], atol=ROUNDING)


# ---------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("name", ["tmpo", "grpo", "vargrad", "ppo", "subtb", "flowrl"])
def test_the_first_update_takes_one_pass_and_has_the_gradient_of_all_rows(name: str) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"), move=0.0)
    objective = load_objective(name)
    torch.manual_seed(0)
    objective.prepare(toy.latent_shape, toy.device)
    objective.observe(forest)
    parameters = [*toy.parameters(), *objective.parameters()]
    gradients, rows = [], []
    for micro_batch in (None, 2):
        for parameter in parameters:
            parameter.grad = None
        result = backward(toy, objective, forest, on_policy=True, micro_batch=micro_batch)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        rows.append(result.forward_rows)
    assert rows[0] == rows[1]
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=ROUNDING)


def test_a_policy_that_is_not_the_rollouts_shows_in_the_ratio_of_a_first_update() -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"), move=0.1)
    result = backward(toy, load_objective("grpo"), forest, on_policy=True, micro_batch=2)
    assert float(log_ratio(result.terms, forest).abs().max()) > 1e-3


SEPARABLE = [("grpo", {"clip": 0.5}), ("grpo", {"kl_beta": 0.1, "credit": "edge"}), ("gardo", {}), ("ddpo", {})]


@pytest.mark.parametrize(("name", "settings"), SEPARABLE)
def test_a_separable_loss_has_the_same_gradient_whatever_other_rows_say(name: str, settings: dict[str, Any]) -> None:
    objective = load_objective(name, **settings)
    assert objective.separable
    _, _, forest = drawn(plan_of("fixed_tree"), move=0.0)
    forest.scores, forest.weights = {"main": forest.rewards, "other": forest.rewards.flip(0)}, {"main": 1.0}
    objective.observe(forest)
    generator = torch.Generator().manual_seed(0)
    count, gradients = len(forest.old_log_prob), []
    own = {name: 0.01 * torch.randn(count, generator=generator) for name in ("log_ratio", "drift_noise", "kl")}
    for scale in (0.0, 0.01):
        values = {name: own[name].clone() for name in own}
        for value in values.values():
            value[2:] += scale * torch.randn(count - 2, generator=generator)
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        terms = {**leaves, "log_prob": forest.old_log_prob + leaves["log_ratio"]}
        terms["log_prob_reference"] = forest.old_log_prob
        terms["log_ratio_reference"] = leaves["log_ratio"]
        loss = objective.loss(terms, forest)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients.append([None if g is None else g[:2] for g in found])
    assert any(g is not None and float(g.abs().max()) > 0 for g in gradients[0])
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize("name", ["grpo", "ddpo"])
def test_later_updates_of_a_separable_loss_take_one_pass_with_the_same_gradient(name: str) -> None:
    toy, _, forest = drawn(plan_of("fixed_tree"), move=0.0)
    objective = load_objective(name)
    objective.observe(forest)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.add_(1e-5)
    results = []
    for micro_batch in (None, 2):
        for parameter in toy.parameters():
            parameter.grad = None
        result = backward(toy, objective, forest, update=1, micro_batch=micro_batch)
        results.append((result.loss, result.forward_rows, toy.gradient().clone()))
    assert results[0][:2] == pytest.approx(results[1][:2], abs=1e-6)
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-4, atol=ROUNDING)


@every_pair
def test_the_rollouts_own_graph_gives_the_gradient_of_a_new_evaluation(objective: str, sampler: str) -> None:
    gradients = []
    for keep_graph in (False, True):
        toy = ToyBackbone()
        toy.nudge(0.1)
        forest = rollout(toy, PROMPTS, plan_of(sampler), seed=4, iteration=3, keep_graph=keep_graph)
        forest.rewards = torch.tensor(REWARDS * forest.plan.groups, dtype=torch.float64).flatten()
        toy.reset_counters()
        made = prepared(objective, forest)
        found = backward(toy, made, forest, on_policy=True)
        others = made.needs.reference * len(made.rows(forest, 0))
        if keep_graph and not forest.plan.sides and made.replays and made.trained_leaves(forest) is None and found.rows:
            assert toy.rows == others
            assert forest.live_velocity is None
            if "log_ratio" in found.terms:
                assert torch.equal(found.terms["log_ratio"], torch.zeros_like(found.terms["log_ratio"]))
        gradients.append((toy.gradient(), found.loss, found.forward_rows))
    (new, new_loss, new_rows), (kept, kept_loss, kept_rows) = gradients
    # The rows of each step stand in a call of their own: float32 sums in another order.
    torch.testing.assert_close(kept, new, atol=ROUNDING, rtol=0)
    assert kept_loss == pytest.approx(new_loss, abs=ROUNDING)
    assert kept_rows == new_rows


def test_a_kept_graph_is_dropped_where_its_rows_do_not_fit_into_a_microbatch() -> None:
    toy, plan = ToyBackbone(), plan_of("independent")
    forest = rollout(toy, PROMPTS, plan, seed=0, keep_graph=True)
    forest.rewards = torch.tensor(REWARDS).flatten()
    toy.reset_counters()
    backward(toy, load_objective("ddpo"), forest, on_policy=True, micro_batch=3)
    assert toy.rows == plan.replay_rows(2)
    assert forest.live_velocity is None
