import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, UserError, load_objective, rollout
from alignbench.rollouts.terms import Terms
from alignbench.training.engine import backward
from objectives.tmpo import TMPO
from tests.support.toys import PROMPTS, ToyBackbone, hand_made_forest, tree

NAN = math.nan
LN2, LN3 = math.log(2), math.log(3)
FORMS = ("log_ratio", "centred", "forward_kl", "squared")
RATIOS = ("rationorm", "trajectory", "released", "none")
REFERENCES = ("none", "behaviour", "frozen")
OFF_POLICY: dict[str, Any] = {"clip": 0.1, "lambda_ref": 0.3, "temperature": 1.5}

# float32 losses of about 1.
ROUNDING = 1e-6


def tmpo(**settings: object) -> TMPO:
    """Beta from the first iteration on, no reference term; unless the test says otherwise."""
    objective = load_objective("tmpo", **{"beta_warmup": 0, "beta": 1.0, "lambda_ref": 0.0, **settings})
    assert isinstance(objective, TMPO)
    return objective


def terms_of(
    log_prob: Sequence[float], drift_noise: Sequence[float] | None = None, reference: Sequence[float] | None = None
) -> Terms:
    terms = {"log_prob": torch.tensor(log_prob, requires_grad=True)}
    terms["drift_noise"] = torch.tensor(drift_noise or [0.0] * len(log_prob), requires_grad=True)
    if reference is not None:
        terms["log_prob_reference"] = torch.tensor(reference)
    return terms


def chains(rewards: Sequence[Sequence[float]], old_log_prob: Sequence[float], **more: int) -> RolloutForest:
    """One stochastic step: leaf i ends edge i."""
    return hand_made_forest(rewards, [[i] for i in range(len(old_log_prob))], old_log_prob, **more)


# Two leaves, rewards 1 and 3: standardised to -1 and 1, q = softmax(-1, 1); s = (0, ln 3): p = (1/4, 3/4).
# A = log q - log p = (-2.126928 + 1.386294, -0.126928 + 0.287682) = (-0.740634, 0.160754).
PAIR = [[1.0, 3.0]]


@pytest.mark.parametrize("ratio", ["rationorm", "trajectory", "released"])
def test_the_first_loss_of_two_leaves(ratio: str) -> None:
    loss = tmpo(ratio=ratio).loss(terms_of([0.0, LN3]), chains(PAIR, [0.0, LN3]))
    # -(A_1 + A_2) / 2
    assert loss.item() == pytest.approx(0.289940, abs=2e-6)  # six decimals


def test_without_a_ratio_the_loss_is_zero_and_only_its_gradient_counts() -> None:
    terms = terms_of([0.0, LN3])
    loss = tmpo(ratio="none").loss(terms, chains(PAIR, [0.0, 0.0]))
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert gradient(terms) == pytest.approx([0.370317, -0.080377], abs=2e-6)  # -A_i / 2, six decimals


def test_the_trajectory_ratio_is_clipped_where_that_is_pessimistic() -> None:
    loss = tmpo(ratio="trajectory").loss(terms_of([0.0, LN3]), chains(PAIR, [-math.log(1.5), LN3 - math.log(1.5)]))
    # rho = 1.5, clip .2: min(1.5 A_1, 1.2 A_1) = 1.5 A_1 and min(1.5 A_2, 1.2 A_2) = 1.2 A_2.
    assert loss.item() == pytest.approx((1.5 * 0.740634 - 1.2 * 0.160754) / 2, abs=2e-6)


def test_the_rationorm_ratio_is_the_exponential_of_the_mean_regulated_log_ratio() -> None:
    forest = hand_made_forest(PAIR, [[0, 1], [0, 2]], [0.0, 0.0, LN3])
    loss = tmpo(ratio="rationorm").loss(terms_of([0.0, 0.0, LN3], [0.1, 0.1, -0.3]), forest)
    # rho = exp((.1 + .1) / 2) and exp((.1 - .3) / 2); both inside the clip.
    assert loss.item() == pytest.approx((1.105171 * 0.740634 - 0.904837 * 0.160754) / 2, abs=2e-6)


def test_the_released_ratio_is_centred_in_its_group_with_a_clipped_rationorm_weight() -> None:
    terms = terms_of([0.0, LN3], [0.1, 0.5])
    loss = tmpo(ratio="released").loss(terms, chains(PAIR, [-0.1, LN3 - 0.3]))
    torch.autograd.backward(loss)
    # D = (.1, .3), centred (-.1, .1); weights exp(.1) and exp(.5), the latter clipped to 1.2.
    expected = (0.904837 * 0.740634 * 1.105171 - 1.105171 * 0.160754 * 1.2) / 2
    assert loss.item() == pytest.approx(expected, abs=2e-6)
    # The group mean of D and the weight carry no gradient: grad s_i is -rho_i A_i w_i / 2.
    assert gradient(terms) == pytest.approx([0.740634 / 2, -1.105171 * 0.160754 * 1.2 / 2], abs=2e-6)
    assert terms["drift_noise"].grad is None


def test_the_behaviour_term_is_the_mean_squared_move_of_each_path_per_step() -> None:
    objective = tmpo(ratio="none", reference="behaviour", lambda_ref=0.05)
    forest = hand_made_forest(PAIR, [[0, 1], [0, 2]], [0.0, 0.0, LN3])
    loss = objective.loss(terms_of([0.2, 0.4, LN3]), forest)
    # ((.2 + .4) / 2)^2 and ((.2 + 0) / 2)^2
    assert loss.item() == pytest.approx(0.05 * (0.09 + 0.01) / 2, abs=ROUNDING)


def test_a_frozen_reference_enters_the_policy_distribution_and_the_reference_term() -> None:
    objective = tmpo(ratio="trajectory", reference="frozen", lambda_ref=0.1)
    loss = objective.loss(terms_of([1.0, 1.0], reference=[1.0, 1.0 - LN3]), chains(PAIR, [1.0, 1.0]))
    # s - s_ref = (0, ln 3), as above; the term is .1 (0 + ln^2 3) / 2.
    assert loss.item() == pytest.approx(0.289940 + 0.05 * LN3**2, abs=3e-6)
    assert objective.needs.reference
    assert not tmpo(reference="behaviour").needs.reference


# Three leaves, rewards 0, 0, 3: standardised to (-1, -1, 2) / sqrt 2. With beta = sqrt 2 ln 2: q = (.1, .1, .8).
# s = (5, 5 + ln 2, 5) on a tree whose first edge is shared: p = (.25, .5, .25). A = (ln .4, ln .2, ln 3.2).
TRIPLE = [[0.0, 0.0, 3.0]]
TRIPLE_EDGES = [[0, 1], [0, 2], [0, 3]]
TRIPLE_S = [5.0, 0.0, LN2, 0.0]
A = [math.log(0.4), math.log(0.2), math.log(3.2)]
P, Q = [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]
BETA = math.sqrt(2) * LN2


def test_the_first_loss_of_a_tree_of_three_leaves() -> None:
    objective = tmpo(beta=BETA, advantage="log_ratio")
    loss = objective.loss(terms_of(TRIPLE_S), hand_made_forest(TRIPLE, TRIPLE_EDGES, TRIPLE_S))
    assert loss.item() == pytest.approx(0.454193, abs=2e-6)  # six decimals


@pytest.mark.parametrize(
    ("advantage", "coefficients"),
    [
        ("log_ratio", [-a / 3 for a in A]),
        ("centred", [-(a - sum(A) / 3) / 3 for a in A]),
        ("forward_kl", [0.15, 0.4, -0.55]),
        ("squared", [-2 * (a - p * sum(A)) for a, p in zip(A, P, strict=True)]),
    ],
)
def test_the_gradient_on_each_leafs_log_prob_has_the_coefficients_of_its_form(
    advantage: str, coefficients: list[float]
) -> None:
    terms = terms_of(TRIPLE_S)
    objective = tmpo(beta=BETA, advantage=advantage, ratio="none")
    torch.autograd.backward(objective.loss(terms, hand_made_forest(TRIPLE, TRIPLE_EDGES, TRIPLE_S)))
    # The shared edge gets the sum over its descendants.
    assert gradient(terms) == pytest.approx([sum(coefficients), *coefficients], abs=2e-6)  # float32
    if advantage != "log_ratio":
        assert sum(coefficients) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("form", ["forward_kl", "squared"])
def test_two_forms_are_the_gradients_of_the_loss_that_their_name_says(form: str) -> None:
    s = torch.tensor([5.0, 5.0 + LN2, 5.0], dtype=torch.float64, requires_grad=True)
    log_p, log_q = torch.log_softmax(s, 0), torch.log(torch.tensor(Q, dtype=torch.float64))
    named = (log_q.exp() * (log_q - log_p)).sum() if form == "forward_kl" else ((log_p - log_q) ** 2).sum()
    (expected,) = torch.autograd.grad(named, s)
    terms = terms_of(TRIPLE_S)
    objective = tmpo(beta=BETA, advantage=form, ratio="none")
    torch.autograd.backward(objective.loss(terms, hand_made_forest(TRIPLE, TRIPLE_EDGES, TRIPLE_S)))
    assert gradient(terms)[1:] == pytest.approx(expected.tolist(), abs=2e-6)  # float32


@pytest.mark.parametrize("advantage", FORMS)
def test_the_first_gradient_is_the_same_for_every_trajectory_ratio(advantage: str) -> None:
    found = []
    for ratio in ("trajectory", "released", "none"):
        terms = terms_of(TRIPLE_S)
        objective = tmpo(beta=BETA, advantage=advantage, ratio=ratio)
        torch.autograd.backward(objective.loss(terms, hand_made_forest(TRIPLE, TRIPLE_EDGES, TRIPLE_S)))
        found.append(gradient(terms))
    assert found[0] == pytest.approx(found[2], abs=ROUNDING)
    assert found[1] == pytest.approx(found[2], abs=ROUNDING)


def test_the_temperature_divides_the_log_probs_inside_the_softmax() -> None:
    # s / 2 = (0, ln 3) gives the p of the pair.
    loss = tmpo(temperature=2.0, ratio="trajectory").loss(terms_of([0.0, 2 * LN3]), chains(PAIR, [0.0, 2 * LN3]))
    assert loss.item() == pytest.approx(0.289940, abs=2e-6)


@pytest.mark.parametrize(("iteration", "beta"), [(0, 0.8), (75, 1.4), (150, 2.0), (900, 2.0)])
def test_beta_warms_up_linearly_to_the_published_values(iteration: int, beta: float) -> None:
    objective = load_objective("tmpo")
    assert isinstance(objective, TMPO)
    assert objective.beta(iteration) == pytest.approx(beta)


def test_the_loss_uses_the_beta_of_the_forests_iteration() -> None:
    objective = tmpo(beta_start=0.5, beta=1.5, beta_warmup=10, ratio="trajectory")
    # Halfway: beta = 1, the pair of above.
    loss = objective.loss(terms_of([0.0, LN3]), chains(PAIR, [0.0, LN3], iteration=5))
    assert loss.item() == pytest.approx(0.289940, abs=2e-6)


def in_numpy(forest: RolloutForest, terms: Terms, options: dict[str, Any], beta: float) -> float:
    """The loss once more, in float64 and numpy, for forests whose groups are complete or have dropped leaves."""
    tensors = (terms["log_prob"], forest.old_log_prob, terms["drift_noise"], terms["log_prob_reference"])
    lp, old, drift, ref = (np.asarray(t.detach(), dtype=np.float64) for t in tensors)
    paths = forest.leaf_edges.numpy()
    k, eps = forest.group_size, options["clip"]
    parts = []
    for g in range(forest.groups):
        r = forest.rewards.numpy().astype(np.float64)[g * k : (g + 1) * k]
        here = ~np.isnan(r)
        r, path = r[here], paths[g * k : (g + 1) * k][here]
        if r.size == 0 or r.min() == r.max():
            continue
        s, s_old, s_ref = lp[path].sum(1), old[path].sum(1), ref[path].sum(1)
        logits = (s - s_ref if options["reference"] == "frozen" else s) / options["temperature"]
        goal = beta * (r - r.mean()) / r.std()
        log_p, log_q = logits - np.log(np.exp(logits).sum()), goal - np.log(np.exp(goal).sum())
        a = log_q - log_p
        match options["advantage"]:
            case "centred":
                a = a - a.mean()
            case "forward_kl":
                a = len(r) * (np.exp(log_q) - np.exp(log_p))
            case "squared":
                a = 2 * len(r) * (a - np.exp(log_p) * a.sum())
        log_w, weight = drift[path].mean(1), np.ones(len(r))
        match options["ratio"]:
            case "rationorm":
                rho = np.exp(log_w)
            case "trajectory":
                rho = np.exp(s - s_old)
            case "released":
                rho, weight = np.exp(s - s_old - (s - s_old).mean()), np.clip(np.exp(log_w), 1 - eps, 1 + eps)
            case _:
                rho, a = np.ones(len(r)), np.zeros(len(r))
        part = np.maximum(-rho * a, -np.clip(rho, 1 - eps, 1 + eps) * a) * weight
        if options["reference"] != "none":
            other = s_ref if options["reference"] == "frozen" else s_old
            part = part + options["lambda_ref"] * ((s - other) / path.shape[1]) ** 2
        parts.append(part)
    return float(np.concatenate(parts).mean())


def random_case(missing: bool = False) -> tuple[RolloutForest, Terms]:
    """Two groups on trees of two levels, 3 x 3 leaves, off-policy."""
    rng = np.random.default_rng(5)
    paths = [[12 * g + i, 12 * g + 3 + 3 * i + j] for g in range(2) for i in range(3) for j in range(3)]
    rewards = rng.integers(-8, 9, size=(2, 9)) / 4
    if missing:
        rewards[0, 2] = rewards[1, 5] = rewards[1, 8] = NAN
    old = rng.normal(0, 0.5, 24)
    forest = hand_made_forest(rewards.tolist(), paths, old.tolist())
    move, drift, gap = rng.normal(0, 0.15, 24), rng.normal(0, 0.15, 24), rng.normal(0, 0.3, 24)
    return forest, terms_of((old + move).tolist(), drift.tolist(), (old + gap).tolist())


@pytest.mark.parametrize("advantage", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_loss_equals_a_second_implementation_off_policy(advantage: str, ratio: str, reference: str) -> None:
    options = {"advantage": advantage, "ratio": ratio, "reference": reference, **OFF_POLICY}
    forest, terms = random_case()
    expected = in_numpy(forest, terms, options, beta=1.0)
    assert tmpo(**options).loss(terms, forest).item() == pytest.approx(expected, abs=1e-5)  # float32 sums of about 10


@pytest.mark.parametrize("advantage", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_leaves_without_a_reward_are_left_out(advantage: str, ratio: str) -> None:
    options = {"advantage": advantage, "ratio": ratio, "reference": "behaviour", **OFF_POLICY}
    forest, terms = random_case(missing=True)
    expected = in_numpy(forest, terms, options, beta=1.0)
    loss = tmpo(**options).loss(terms, forest)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(expected, abs=1e-5)  # float32 sums of about 10
    # Edges that lead to dropped leaves alone.
    for leaf in (2, 14, 17):
        assert gradient(terms)[int(forest.leaf_edges[leaf, 1])] == 0.0
    assert np.isfinite(gradient(terms)).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("group", [[0.1, 0.1, 0.1], [0.1, NAN, 0.1], [0.7, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_with_nothing_to_prefer_gets_no_gradient(ratio: str, reference: str, group: list[float]) -> None:
    objective = tmpo(ratio=ratio, reference=reference, lambda_ref=0.3)
    forest = chains([group, [0.0, 1.0, 2.0]], [0.0] * 6)
    terms = terms_of([0.1, 0.3, -0.2, 0.1, 0.3, -0.2], [0.01, 0.02, 0.03] * 2, [0.0] * 6)
    loss = objective.loss(terms, forest)
    torch.autograd.backward(loss)
    for name in ("log_prob", "drift_noise"):
        moved = terms[name].grad
        if moved is not None:
            assert moved[:3].tolist() == [0.0, 0.0, 0.0]
    assert sum(abs(t.grad).sum() for t in terms.values() if t.grad is not None) > 0
    alone = chains([[0.0, 1.0, 2.0]], [0.0] * 3)
    halved = terms_of([0.1, 0.3, -0.2], [0.01, 0.02, 0.03], [0.0] * 3)
    assert loss.item() == pytest.approx(objective.loss(halved, alone).item(), abs=ROUNDING)


@pytest.mark.parametrize("ratio", RATIOS)
def test_with_no_group_to_learn_from_loss_and_gradient_are_zero(ratio: str) -> None:
    terms = terms_of([0.1, 0.3], [0.1, 0.2])
    loss = tmpo(ratio=ratio, lambda_ref=0.3).loss(terms, chains([[2.0, 2.0]], [0.0, 0.0]))
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    for name in ("log_prob", "drift_noise"):
        moved = terms[name].grad
        assert moved is None or moved.tolist() == [0.0, 0.0]


def permuted(forest: RolloutForest, order: Sequence[int]) -> RolloutForest:
    """The same rollout with the leaves of each group in another order."""
    k = forest.group_size
    index = torch.tensor([g * k + i for g in range(forest.groups) for i in order])
    leaves, leaf_edges, rewards = forest.leaves[index], forest.leaf_edges[index], forest.rewards[index]
    return replace(forest, leaves=leaves, leaf_edges=leaf_edges, rewards=rewards)


@pytest.mark.parametrize("advantage", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("missing", [False, True])
def test_leaf_order_and_a_constant_added_to_rewards_change_nothing(advantage: str, ratio: str, missing: bool) -> None:
    objective = tmpo(advantage=advantage, ratio=ratio, lambda_ref=0.3)
    forest, terms = random_case(missing)
    loss = objective.loss(terms, forest)
    torch.autograd.backward(loss)
    expected = gradient(terms)
    # Sums in another order, and rewards that are multiples of 1/4, so that the shift is exact.
    for other, name in ((permuted(forest, [4, 8, 0, 2, 7, 1, 3, 6, 5]), "order"), (forest, "constant")):
        if name == "constant":
            other.rewards = forest.rewards + 16
        _, fresh = random_case(missing)
        again = objective.loss(fresh, other)
        torch.autograd.backward(again)
        assert again.item() == pytest.approx(loss.item(), abs=1e-5), name
        assert gradient(fresh) == pytest.approx(expected, abs=1e-5), name


def gradient(terms: Terms) -> list[float]:
    """d(loss)/d(log_prob) where there is one, else that on the drift."""
    found: Tensor | None = terms["log_prob"].grad if terms["log_prob"].grad is not None else terms["drift_noise"].grad
    assert found is not None
    return list(found.tolist())


def test_a_step_against_the_gradient_raises_the_density_of_the_better_leaves() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, tree(5, (1, 2), children=2), seed=0)
    forest.rewards = torch.tensor([0.0, 0.0, 0.0, 1.0] * 2)
    objective = tmpo(advantage="forward_kl", ratio="trajectory")
    before = backward(toy, objective, forest).terms
    with torch.no_grad():
        for parameter in toy.net.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    after = backward(toy, objective, forest).terms
    s = forest.path_sum(after["log_prob"] - before["log_prob"])
    assert bool((s[:, 3] > s[:, :3].mean(1)).all())


def test_diagnostics_of_the_tree_of_three_leaves() -> None:
    objective = tmpo(beta=BETA)
    terms = {"log_prob": torch.tensor(TRIPLE_S)}
    numbers = objective.diagnostics(terms, hand_made_forest(TRIPLE, TRIPLE_EDGES, TRIPLE_S))
    expected = {
        "beta": BETA,
        "kl_target_policy": 0.1 * A[0] + 0.1 * A[1] + 0.8 * A[2],
        "ess_policy": 1 / (0.0625 + 0.25 + 0.0625),
        "ess_target": 1 / (0.01 + 0.01 + 0.64),
        "policy_term_abs": (2 * math.log(4 / 3) + math.log(1.5)) / 3,
        "target_term_abs": (2 * math.log(1 / 0.3) + math.log(2.4)) / 3,
        "advantage_mean": sum(A) / 3,
        "advantage_abs": (-A[0] - A[1] + A[2]) / 3,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-5)  # float32
    # The skew of (ln .4, ln .2, ln 3.2): third moment over cubed deviation, in float64.
    a = np.array(A) - np.mean(A)
    assert numbers["advantage_skew"] == pytest.approx((a**3).mean() / (a**2).mean() ** 1.5, abs=1e-4)


def test_diagnostics_of_a_batch_without_preferences_are_empty() -> None:
    assert tmpo().diagnostics(terms_of([0.0, 0.0]), chains([[1.0, 1.0]], [0.0, 0.0])) == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"betta": 1.0}, "objective tmpo: there is no key 'betta'; did you mean 'beta'"),
        ({"clip": 0}, "objective tmpo: clip: input should be greater than 0, got 0"),
        ({"temperature": -1}, "temperature: .*greater than 0, got -1"),
        ({"advantage": "reverse"}, "advantage: .*'log_ratio', 'centred', 'forward_kl' or 'squared', got 'reverse'"),
        ({"reference": "old"}, "reference: .*got 'old'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_objective("tmpo", **settings)


def test_a_cosine_warm_up_is_half_way_at_half_time_and_gentle_at_both_ends() -> None:
    objective = tmpo(beta_start=1.0, beta=3.0, beta_warmup=10, beta_schedule="cosine")
    assert [objective.beta(i) for i in (0, 5, 10, 99)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    # (1 - cos 18 degrees) / 2 = 0.0244717
    assert objective.beta(1) == pytest.approx(1 + 2 * 0.0244717, abs=1e-6)


def test_beta_is_solved_for_an_effective_sample_size() -> None:
    objective = tmpo(ess_target=0.6)
    # Two leaves: q = (1, e^{2 beta}) / Z; its effective size 1 / (q1^2 + q2^2) is 1.2 at q2 = (1 + sqrt(2/3)) / 2.
    forest = chains(PAIR, [0.0, 0.0])
    objective.observe(forest)
    q = (1 + math.sqrt(2 / 3)) / 2
    assert objective.beta(7) == pytest.approx(math.log(q / (1 - q)) / 2, abs=1e-5)
    _, log_q, counts = objective.log_p_q(terms_of([0.0, 0.0]), forest)
    assert float(1 / (counts * log_q.exp() ** 2).sum()) == pytest.approx(1.2, abs=1e-4)
    other = tmpo(ess_target=0.6)
    other.load_state(objective.state())
    assert other.beta(7) == objective.beta(7)


def test_a_beta_that_ties_forbid_is_bounded_and_without_spread_the_last_one_stays() -> None:
    objective = tmpo(ess_target=0.4)
    objective.observe(chains([[0.0, 1.0, 1.0]], [0.0] * 3))  # two of three are best: never below 2/3
    assert objective.beta(0) == 50.0
    objective.observe(chains([[1.0, 1.0, 1.0]], [0.0] * 3))
    assert objective.beta(0) == 50.0
