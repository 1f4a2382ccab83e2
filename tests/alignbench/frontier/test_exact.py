"""The front of a backbone that knows its target, against closed forms and against its own estimate by weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alignbench import UserError
from alignbench.backbones.gaussian_mixture import GaussianMixture
from alignbench.config.run_config import RunConfig, load_config
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.frontier.exact import knows_target
from alignbench.frontier.front import BEST_OF, KL, REWARD, VALIDATION, dependence
from alignbench.frontier.making import front_of
from alignbench.load import load_configured_backbone
from alignbench.tasks import load_task


def config(task: str = "equal_modes", **evaluation: int) -> RunConfig:
    settings = {"prompts": 2, "images_per_prompt": 50, **evaluation}
    options = {"backbone": "gaussian_mixture", "task": task, "evaluation": settings}
    return load_config(preset="smoke", options=options)


def test_reward_and_kl_of_a_quadratic_reward_are_those_of_its_closed_form(tmp_path: Path) -> None:
    front, _ = front_of(config("quadratic"), tmp_path, betas=[1.0, 3.0], best_of=(2,))
    assert front.record.exact
    policy = load_configured_backbone(config("quadratic"))
    assert isinstance(policy, GaussianMixture)
    for row, beta in enumerate((0.0, 1.0, 3.0)):
        tilt = policy.tilted("quadratic 0", beta)
        assert front.values(REWARD)[row, 0] == pytest.approx(tilt.reward)
        assert front.values(KL)[row, 0] == pytest.approx(tilt.kl, abs=1e-9)
    # d KL / d E[R] along the front is beta, so that the gain of reward from 1 to 3 costs between 1 and 3 nats for each unit.
    gain, cost = np.diff(front.values(REWARD)[1:, 0])[0], np.diff(front.values(KL)[1:, 0])[0]
    assert 1.0 < cost / gain < 3.0
    best = front.values(REWARD, BEST_OF)[0]
    assert (best > front.values(REWARD)[0]).all()


def test_draws_of_the_tilt_have_its_reward_and_its_modes() -> None:
    """Three of six modes are good: at beta 4 each of them has a third of what the good ones hold together."""
    policy = load_configured_backbone(config())
    assert isinstance(policy, GaussianMixture)
    tilt = policy.tilted("equal_modes 0", 4.0)
    draws = tilt.draw(20_000, torch.Generator().manual_seed(0)).double()
    suite = MetricSuite(load_task("equal_modes"))
    scores = suite.score(policy.decode(draws.float()), ["equal_modes 0"] * len(draws), when="here")["scenario_reward"]
    assert scores.mean() == pytest.approx(tilt.reward, abs=4 * scores.std() / 20_000**0.5)
    angles = torch.atan2(draws[:, 1], draws[:, 0]).remainder(2 * np.pi)
    modes = torch.bincount((angles / (np.pi / 3)).round().long().remainder(6), minlength=6) / len(draws)
    assert modes[[0, 2, 4]].tolist() == pytest.approx([float(modes[[0, 2, 4]].mean())] * 3, abs=0.015)
    assert float(modes[[0, 2, 4]].sum()) > 0.95
    assert tilt.metrics["modes_covered"] == 1.0
    assert tilt.metrics["kl_model_target"] == pytest.approx(0.0, abs=1e-9)


def test_a_reward_that_the_backbone_does_not_know_has_no_exact_front(tmp_path: Path) -> None:
    policy = load_configured_backbone(config("proxy_reward"))
    known = MetricSuite(load_task("proxy_reward"))
    assert knows_target(policy, ["proxy_reward 0"], known)
    other = tmp_path / "other.yaml"
    prompts = Path(load_task.__code__.co_filename).parent / "scenarios" / "proxy_reward.txt"
    other.write_text(
        f"description: d\ntrain_prompts: {prompts}\neval_prompts: {prompts}\nsame_prompts: true\n"
        "reward: [{eval: scenario_reward, settings: {which: true_reward}}]\n"
    )
    assert not knows_target(policy, ["proxy_reward 0"], MetricSuite(load_task(str(other))))


def test_a_front_is_not_made_for_the_reward_of_a_service(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not ask the scorer at scorer_url"):
        front_of(config().model_copy(update={"scorer_url": "http://127.0.0.1:9"}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_front_of_the_validation_prompts_has_sets_of_their_size(tmp_path: Path) -> None:
    front, _ = front_of(config(validation_prompts=3, validation_images=20), tmp_path, betas=[2.0], best_of=(), kind=VALIDATION)
    assert (front.record.prompt_set, front.record.prompts, front.record.set_size) == (VALIDATION, 3, 20)
    assert {"lgmd", "modes_covered"} <= set(front.metrics)


def test_a_reward_with_another_weight_has_no_exact_front() -> None:
    policy, task = load_configured_backbone(config()), load_task("equal_modes")
    assert knows_target(policy, ["equal_modes 0"], MetricSuite(task))
    assert not knows_target(policy, ["equal_modes 0"], MetricSuite(task.weighted({"scenario_reward": 0.5})))


def test_each_eval_of_sets_has_its_own_metrics(tmp_path: Path) -> None:
    front, _ = front_of(config(), tmp_path, betas=[1.0], best_of=())
    assert len(front.record.set_metrics) == len(set(front.record.set_metrics))
    assert len(front.record.headline) == len(set(front.record.headline))


def test_a_front_depends_on_the_solver_and_an_older_one_is_that_of_euler() -> None:
    of = config().resolved()
    older = {**of, "evaluation": {k: v for k, v in of["evaluation"].items() if k != "solver"}}
    assert dependence(of) == dependence(older)
    assert dependence(of) != dependence({**of, "evaluation": {**of["evaluation"], "solver": "memoryless"}})
