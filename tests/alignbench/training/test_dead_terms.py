"""Dead terms: planted ones are found in a run, healthy objectives raise no warning, and shares are those computed by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from alignbench import Objective, RolloutForest, registry, run
from alignbench.config.run_config import RunConfig, load_config
from alignbench.evaluation.evaluate import Evaluation
from alignbench.loss_parts import loss_part, measured_parts
from alignbench.objective import Needs
from alignbench.records.record import Result
from alignbench.rollouts.terms import Terms, Velocities
from alignbench.testing import hand_made_forest
from alignbench.training.dead_terms import gradient_record, measure, unexplained
from alignbench.training.progress import Silent

BASES: dict[str, Evaluation] = {}
"""Base models that were evaluated, so that this is done once."""
SMALL = {"name": "gaussian_mixture", "hidden": 8, "layers": 1, "quadrature": 12}
HERE = "tests.alignbench.training.test_dead_terms"


class Policy(Objective):
    """A healthy objective: a plain policy gradient."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        advantage = (forest.rewards - forest.rewards.mean())[:, None]
        return loss_part("policy", -(advantage * terms["log_ratio"][forest.leaf_edges]).mean())


class DetachedPart(Policy):
    """Its penalty has no gradient."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        kept_alive = 0.1 * terms["kl"].mean()
        return super().loss(terms, forest) + kept_alive + loss_part("penalty", 0.1 * terms["kl"].detach().mean())


class ZeroPart(Policy):
    """Its penalty is multiplied by 0."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return super().loss(terms, forest) + loss_part("penalty", 0.0 * terms["drift_noise"].square().mean())


class UnusedReference(Policy):
    """It asks for a reference that its loss does not use."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)


class UnusedTerm(Policy):
    """It computes a term that its loss does not use."""

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        return super().terms(rows, velocities) | {"speed": velocities.policy.flatten(1).norm(dim=1)}


class Contrast(Policy):
    """It compares the policy with the behaviour policy."""

    @property
    def needs(self) -> Needs:
        return Needs(behaviour=True)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        assert velocities.behaviour is not None
        apart = (velocities.policy - velocities.behaviour).flatten(1).square().mean(1)
        return super().terms(rows, velocities) | {"apart": apart}

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return super().loss(terms, forest) + loss_part("contrast", terms["apart"].mean())


class UnusedBehaviour(Contrast):
    """It asks for a behaviour policy that its loss does not use."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return Policy.loss(self, terms, forest)


class Listening(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


def of(objective: str, preset: str = "smoke", **changes: Any) -> RunConfig:
    few: Any = {"prompts": 1, "images_per_prompt": 2, "steps": 4, "every": None}
    options = {"backbone": SMALL, "objective": objective, "iterations": 3, "evaluation": few, **changes}
    return load_config(preset=preset, options={"save_images": False, "snapshots": 0, **options})


def ran(config: RunConfig, out: Path) -> tuple[Result, list[str]]:
    view = Listening()
    return run(config, out, console=view, bases=BASES), view.told


@pytest.mark.parametrize(
    ("planted", "updates", "dead"),
    [
        ("DetachedPart", 1, {"penalty"}),
        ("ZeroPart", 1, {"penalty"}),
        ("UnusedReference", 1, {"reference"}),
        ("UnusedTerm", 1, {"speed"}),
        ("Contrast", 1, {"behaviour policy"}),
        ("UnusedBehaviour", 2, {"behaviour policy", "apart"}),
    ],
)
def test_a_planted_dead_term_is_told_and_recorded(tmp_path: Path, planted: str, updates: int, dead: set[str]) -> None:
    result, told = ran(of(f"{HERE}:{planted}", updates_per_rollout=updates), tmp_path / "run")
    assert result.gradient is not None
    assert set(result.gradient.inactive) == dead
    assert len(told) == len(dead)
    assert all(any(name in sentence for sentence in told) for name in dead)


@pytest.mark.parametrize(("healthy", "updates"), [("Policy", 1), ("Contrast", 2)])
def test_a_healthy_plug_in_raises_no_warning(tmp_path: Path, healthy: str, updates: int) -> None:
    result, told = ran(of(f"{HERE}:{healthy}", updates_per_rollout=updates), tmp_path / "run")
    assert told == []
    assert result.gradient is not None
    assert result.gradient.inactive == {}


@pytest.mark.parametrize("objective", registry.names("objectives"))
def test_no_objective_that_ships_raises_a_warning_off_policy(tmp_path: Path, objective: str) -> None:
    result, told = ran(of(objective, updates_per_rollout=2), tmp_path / "run")
    assert told == []
    assert (result.gradient is None) == (objective == "none")
    assert result.gradient is None or sum(share or 0 for share in result.gradient.parts.values()) == pytest.approx(1)


@pytest.mark.parametrize("objective", [name for name in registry.names("objectives") if name not in ("nft", "none")])
def test_the_preset_quick_warns_of_none_of_its_own_settings(tmp_path: Path, objective: str) -> None:
    assert ran(of(objective, "quick", prompts_per_iteration=4), tmp_path / "run")[1] == []


def test_nft_in_the_preset_quick_is_told_that_its_contrast_is_zero(tmp_path: Path) -> None:
    result, told = ran(of("nft", "quick", prompts_per_iteration=4), tmp_path / "run")
    assert told[0] == (
        "objective nft: the behaviour policy has no effect: with decay_rate=0 and updates_per_rollout=1 it is the policy itself"
    )
    assert told[1].startswith("objective nft: the contrast has no effect: v+ and v- are both v_old = v")
    assert len(told) == 2
    assert result.gradient is not None
    assert {"beta", "behaviour policy", "contrast"} <= set(result.gradient.inactive)
    two, told = ran(of("nft", "quick", prompts_per_iteration=4, updates_per_rollout=2), tmp_path / "two")
    assert told == []
    assert two.gradient is not None
    assert "contrast" not in two.gradient.inactive


def test_measuring_changes_no_number_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of("grpo", updates_per_rollout=2)
    ran(config, tmp_path / "measured")
    monkeypatch.setattr("alignbench.training.dead_terms.ITERATIONS", 0)
    ran(config, tmp_path / "not")
    first, second = (
        pd.read_parquet(tmp_path / name / "metrics.parquet").drop(columns="seconds") for name in ("measured", "not")
    )
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_a_resumed_run_has_the_same_shares(tmp_path: Path) -> None:
    config = of("ppo")
    whole = run(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run(config, tmp_path / "run", resume=True)
    assert again.gradient == whole.gradient
    assert whole.gradient is not None
    assert whole.gradient.updates == 3


def test_shares_are_the_norms_of_each_parts_gradient() -> None:
    class Two(Objective):
        def terms(self, rows: Any, velocities: Velocities) -> Terms:
            v = velocities.policy.flatten(1).mean(1)
            return {"a": v, "b": 2 * v}

        def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
            return loss_part("x", 3 * terms["a"].sum()) + loss_part("y", 4 * terms["b"].sum()) + terms["a"].sum()

    objective = Two(Two.Settings())
    forest = hand_made_forest([[0.0, 1.0]], [[0], [1]], [0.0, 0.0])
    found = measure(objective, {"a": torch.zeros(4), "b": torch.zeros(4)}, forest, 0)
    assert found is not None
    # d/da = 3 or 1 and d/db = 4 at four places each; a norm over four equal numbers is twice the number.
    assert found["parts"] == pytest.approx({"x": 6.0, "y": 8.0, "rest": 2.0})
    assert found["terms"] == pytest.approx({"a": 8.0, "b": 8.0})
    assert unexplained([found], objective, 1) == {}


def test_an_update_without_any_gradient_says_nothing() -> None:
    forest = hand_made_forest([[1.0, 1.0]], [[0], [1]], [0.0, 0.0])
    objective = Policy(Policy.Settings())
    assert measure(objective, {"log_ratio": torch.zeros(2)}, forest, 0) is None
    assert measure(objective, {}, forest, 0) is None
    assert unexplained([], objective, 1) == {}


def test_a_part_is_the_tensor_itself_unless_parts_are_measured() -> None:
    value = torch.tensor(2.0)
    assert loss_part("x", value) is value
    with measured_parts() as marked:
        assert loss_part("x", value) is value
    assert marked.names == ["x"]
    with measured_parts(only="y"):
        assert float(loss_part("x", value)) == 0.0
        assert loss_part("y", value) is value


def test_an_update_with_a_gradient_elsewhere_gives_no_term_a_share() -> None:
    record = gradient_record(
        [{"parts": {"value": 2.0}, "terms": {"log_ratio": 0.0}, "models": {}}], Policy(Policy.Settings()), 1
    )
    assert record is not None
    assert record.terms == {"log_ratio": 0.0}
    assert record.parts == {"value": 1.0}
