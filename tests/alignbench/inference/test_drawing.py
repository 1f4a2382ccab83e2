"""What an image costs by each method, against counted rows and scores, and what the configuration refuses."""

from collections.abc import Sequence

import numpy as np
import pytest

from alignbench import UserError
from alignbench.config.inference import INFERENCE_KEYS, InferenceConfig
from alignbench.config.run_config import load_config
from alignbench.inference.drawing import Drawing
from alignbench.inference.reward import Reward
from alignbench.rollouts.noise import group_keys
from tests.support.toys import PROMPTS, ToyBackbone

METHODS = [
    {"method": "ode"},
    {"method": "best_of_n", "n": 3},
    {"method": "best_of_n", "n": 1},
    {"method": "fk", "n": 3},
    {"method": "fk", "n": 2, "resamplings": 0},
    {"method": "fk", "n": 1},
    {"method": "interpolation", "weight": 1.5},
    {"method": "interpolation", "weight": 0.0},
    {"method": "interpolation", "weight": 1.0},
]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_the_cost_of_an_image_is_known_before_it_is_drawn(settings: dict[str, object], solver: str) -> None:
    policy, scored = ToyBackbone(), []

    def score(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        scored.append(len(images))
        return {name: images[..., 0].mean((1, 2)) / 255.0 for name in ("a", "b")}

    config = InferenceConfig(**settings)
    drawing = Drawing(config, Reward(score, {"a": 1.0, "b": 0.5}))
    with drawing.model(policy) as model:
        found = drawing.latents(model, PROMPTS, group_keys(PROMPTS), 2, steps=6, seed=0, solver=solver)
    assert len(found) == 4
    cost = drawing.cost(6, solver)
    assert policy.rows == 4 * cost.model_rows
    assert 2 * sum(scored) == 4 * cost.reward_calls


def test_a_method_that_chooses_needs_a_reward() -> None:
    drawing = Drawing(InferenceConfig(method="best_of_n"))
    with pytest.raises(UserError, match="best_of_n chooses images by the task's reward, and there is none here"):
        drawing.latents(ToyBackbone(), PROMPTS, group_keys(PROMPTS), 2, steps=2, seed=0, solver="euler")


def test_a_setting_of_another_method_is_refused() -> None:
    with pytest.raises(UserError, match=r"inference\.n has no effect with inference\.method=interpolation; it belongs to best"):
        load_config(sets=["inference.method=interpolation", "inference.n=8"])
    with pytest.raises(UserError, match=r"inference\.weight has no effect with inference\.method=ode; it belongs to inter"):
        load_config(sets=["inference.weight=0.5"])


@pytest.mark.parametrize("method", INFERENCE_KEYS)
def test_a_resolved_configuration_can_be_read_again(method: str) -> None:
    config = load_config(sets=[f"inference.method={method}"])
    assert load_config(options=config.resolved()).inference == config.inference


def test_the_bound_of_the_divergence_is_told_for_best_of_n_alone() -> None:
    bounds = {m: Drawing(InferenceConfig(method=m)).kl_bound for m in ("ode", "best_of_n", "fk", "interpolation")}
    assert bounds["best_of_n"] == pytest.approx(np.log(4) - 0.75)
    assert [bounds[m] for m in ("ode", "fk", "interpolation")] == [None] * 3
