"""Sub-trajectory balance on a tree whose exact flow is known, and by its limits."""

import pytest
import torch

from alignbench import RolloutForest, load_objective
from objectives.subtb import SubTB
from tests.support.replays import two_splits

BETA = 1.5
Z = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5


@pytest.fixture
def forest() -> RolloutForest:
    """Two groups of four leaves: a split into two, and each of these into two."""
    return two_splits([0.0, 1.0, 2.0, 3.0], [5.0] * 4)


def exact_terms(forest: RolloutForest) -> dict[str, torch.Tensor]:
    """The tilted policy on a discrete tree whose reference takes each child with probability 1/2, and its flows.

    F(x) = E_ref[exp(beta z) | x]; the tilted policy goes to a child with probability F(child) / (2 F(x)).
    """
    tilt = torch.exp(BETA * Z)
    middle = tilt.view(2, 2).mean(1)
    root = middle.mean()
    log_ratio, log_flow = torch.zeros(len(forest.old_log_prob)), torch.zeros(len(forest.rows))
    for leaf in range(4):
        first, second = forest.leaf_edges[leaf].tolist()
        log_flow[forest.edge_row[first]] = root.log()
        log_flow[forest.edge_row[second]] = middle[leaf // 2].log()
        log_ratio[first] = (middle[leaf // 2] / root).log()
        log_ratio[second] = (tilt[leaf] / middle[leaf // 2]).log()
    reference = torch.zeros_like(log_ratio)
    return {"log_prob": log_ratio, "log_prob_reference": reference, "log_ratio_reference": log_ratio, "log_flow": log_flow}


@pytest.mark.parametrize("decay", [0.01, 2.0, 1e4])
def test_all_residuals_are_zero_for_the_exact_tilt_and_its_flow(forest: RolloutForest, decay: float) -> None:
    objective = load_objective("subtb", beta=BETA, decay=decay)
    assert float(objective.loss(exact_terms(forest), forest)) == pytest.approx(0.0, abs=1e-10)


def test_a_flow_that_is_off_by_a_constant_of_the_group_costs_nothing(forest: RolloutForest) -> None:
    terms = exact_terms(forest)
    terms["log_flow"] = terms["log_flow"] + 3.0
    assert float(load_objective("subtb", beta=BETA).loss(terms, forest)) == pytest.approx(0.0, abs=1e-9)


def test_weights_by_hand_on_paths_of_two_edges(forest: RolloutForest) -> None:
    """Parts (1,2), (1,3), (2,3) have lengths 1, 2, 1; with lambda 2 their weights are 2, 4, 2 of 8."""
    terms = exact_terms(forest)
    terms["log_flow"] = torch.zeros_like(terms["log_flow"])
    terms["log_ratio_reference"] = torch.zeros_like(terms["log_ratio_reference"])
    loss = load_objective("subtb", beta=BETA, decay=2.0).loss(terms, forest)
    # The first part is 0; the two that end at the leaf are -beta z, whose group mean is 0.
    assert float(loss) == pytest.approx(6 / 8 * BETA**2 * float((Z**2).mean()), rel=1e-5)


def test_a_large_decay_with_a_flat_flow_is_vargrad(forest: RolloutForest) -> None:
    torch.manual_seed(0)
    terms = exact_terms(forest)
    terms["log_flow"] = torch.zeros_like(terms["log_flow"])
    terms["log_ratio_reference"] = torch.randn_like(terms["log_ratio_reference"])
    subtb = load_objective("subtb", beta=BETA, decay=1e6).loss(terms, forest)
    vargrad = load_objective("vargrad", beta=BETA).loss(terms, forest)
    # Parts of one edge have 1e-6 of the weight each.
    assert float(subtb) == pytest.approx(float(vargrad), rel=1e-4)


def test_the_flow_is_trained_and_starts_flat() -> None:
    objective = SubTB(SubTB.Settings())
    objective.prepare((2, 4, 4), torch.device("cpu"))
    parameters = list(objective.parameters())
    assert sum(p.numel() for p in parameters) == 5 * 64 + 64 + 64 + 1
    assert float(objective.flow(torch.randn(3, 5)).abs().max()) == 0.0


def test_groups_without_different_rewards_teach_nothing(forest: RolloutForest) -> None:
    forest.rewards = torch.full((8,), 0.5)
    assert float(load_objective("subtb").loss(exact_terms(forest), forest)) == 0.0
