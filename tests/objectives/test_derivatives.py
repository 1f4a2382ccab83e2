"""Each loss's gradient on its terms against central differences in float64, what it detaches held at its value."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, RolloutForest, load_objective
from alignbench.rollouts.terms import Terms
from tests.support.toys import LATENT, hand_made_forest

CASES: list[tuple[str, dict[str, Any]]] = [
    *[
        ("tmpo", {"advantage": advantage, "ratio": ratio, "reference": reference, "clip": 0.1, "lambda_ref": 0.3})
        for advantage, ratio, reference in product(
            ("log_ratio", "centred", "forward_kl", "squared"),
            ("rationorm", "trajectory", "released", "none"),
            ("behaviour", "frozen"),
        )
    ],
    *[
        ("grpo", {"clip": 0.1, "kl_beta": 0.4, "ratio": ratio, "std": std})
        for ratio, std in product(("plain", "guard"), ("group", "batch"))
    ],
    ("grpo", {"clip": 0.1, "kl_beta": 0.4, "kl": "released", "step_weight": "inverse_dt"}),
    ("grpo", {"clip": 0.1, "credit": "edge", "step_weight": "noise"}),
    ("grpo", {"clip": 0.1, "credit": "depth_weighted", "std": "batch"}),
    ("gardo", {"clip": 0.1, "kl_share": 0.5}),
    ("ddpo", {"clip": 0.1}),
    ("ppo", {"clip": 0.1, "gae_lambda": 0.7}),
    ("flowrl", {"beta": 1.0}),
    ("flowrl", {"beta": 1.0, "ratio_clip": None}),
    ("vargrad", {}),
    ("ftb", {}),
    ("ftb", {"alpha": 1.2}),
    ("subtb", {}),
    ("vargrad", {"reference": "none"}),
    ("dpo", {"beta": 2.0, "pairs": "all"}),
    ("raft", {}),
    ("raft", {"weights": "top", "top": 2}),
    ("nft", {"beta": 0.5, "adv_clip": 1.0}),
    ("awm", {"adv_clip": 1.0}),
    ("awm", {"adv_clip": 1.0, "ratio": "average", "clip": 0.3}),
    ("dgpo", {"beta": 2.0}),
    ("dgpo", {"beta": 2.0, "clip": 0.1, "std": "batch"}),
    ("ram", {}),
    ("crd", {}),
    ("crd", {"per": "image", "draws": 2}),
]
STEP = 1e-5
"""Of the differences: their error is about STEP^2 and float64's rounding over STEP, 1e-10 both."""


def random_case() -> tuple[RolloutForest, Terms]:
    """Two groups on trees of two levels, 3 x 3 leaves, off-policy; all terms that any objective asks for, float64."""
    rng = np.random.default_rng(5)
    paths = [[12 * g + i, 12 * g + 3 + 3 * i + j] for g in range(2) for i in range(3) for j in range(3)]
    forest = hand_made_forest(rng.normal(size=(2, 9)).tolist(), paths, rng.normal(0, 0.5, 24).tolist())
    forest.rewards[4] = torch.nan
    forest.states = torch.from_numpy(rng.normal(size=(len(forest.states), 5))).float()
    forest.scores = {"main": forest.rewards, "other": torch.from_numpy(rng.normal(size=18)).float()}
    forest.weights = {"main": 1.0}
    forest.edge_sigma_next = torch.from_numpy(rng.uniform(0.2, 0.8, 24)).float()
    moved = forest.old_log_prob.double()[:, None] + torch.from_numpy(rng.normal(0, 0.15, size=(24, 2)))
    return forest, {
        "log_prob": moved[:, 0],
        "log_prob_reference": moved[:, 1],
        "drift_noise": torch.from_numpy(rng.normal(0, 0.15, 24)),
        "kl": torch.from_numpy(rng.uniform(0, 1, 24)),
        "value": torch.from_numpy(rng.normal(size=24)),
        "log_flow": torch.from_numpy(rng.normal(size=24)),
    }


def terms_for(objective: Objective, forest: RolloutForest, terms: Terms) -> Terms:
    """Those of a path, or for an objective on final samples as many numbers as it has rows."""
    rng = np.random.default_rng(6)
    forest.states = forest.states[:, :, None, None].expand(-1, -1, 2, 2)  # noise needs a latent's shape
    count = len(objective.rows(forest, 0))
    own = {
        "dpo": ("error", "error_reference"),
        "raft": ("error",),
        "nft": ("positive", "negative", "reward_weight", "velocity_distance"),
        "awm": ("likelihood", "likelihood_old", "advantage", "velocity_distance", "ema_distance"),
        "dgpo": ("error", "error_reference", "error_old", "velocity_distance"),
        "ram": ("target_error", "path_slope"),
        "crd": ("implicit_reward", "velocity_distance"),
    }.get(objective.name)
    return terms if own is None else {name: torch.from_numpy(rng.uniform(0.5, 1.5, count)) for name in own}


@contextmanager
def held(values: list[Tensor], recording: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, `detach` notes what it gives, or gives what was noted, in the order of the calls."""
    original, noted = torch.Tensor.detach, iter(values)

    def detach(self: Tensor) -> Tensor:
        if not recording:
            return next(noted)
        values.append(original(self).clone())
        return values[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", detach)
        yield


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_gradient_is_that_of_central_differences(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = load_objective(name, **settings)
    objective.prepare(LATENT, torch.device("cpu"))
    forest, terms = random_case()
    objective.observe(forest)
    terms = terms_for(objective, forest, terms)
    constants: list[Tensor] = []
    at = {key: value.clone().requires_grad_() for key, value in terms.items()}
    with held(constants, True, monkeypatch):
        loss = objective.loss(at, forest)
    gradients = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
    wanted = {key: torch.zeros_like(at[key]) if g is None else g for key, g in zip(at, gradients, strict=True)}
    assert sum(float(g.abs().sum()) for g in wanted.values()) > 0.1

    def value(step: float, key: str, direction: Tensor) -> float:
        with torch.no_grad(), held(constants, False, monkeypatch):
            return float(objective.loss({**terms, key: terms[key] + step * direction}, forest))

    generator = torch.Generator().manual_seed(0)
    for key in terms:
        if key == "log_prob_reference":
            continue  # the reference is never trained
        for _ in range(3):
            direction = torch.randn(terms[key].shape, generator=generator, dtype=torch.float64)
            slope = (value(STEP, key, direction) - value(-STEP, key, direction)) / (2 * STEP)
            assert slope == pytest.approx(float(wanted[key] @ direction), abs=1e-7), key
