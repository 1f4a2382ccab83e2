"""The front of a toy whose reward is the brightness of its images, against rejection sampling and plain means."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignbench import UserError
from alignbench.errors import RunError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.frontier.estimated import draw_samples
from alignbench.frontier.front import BEST_OF, ESS, KL, REWARD, TILT, Front, read_front, summary
from alignbench.frontier.making import front_of
from alignbench.load import load_configured_backbone
from alignbench.scorer import SetMetric
from alignbench.tasks import load_task
from tests.support.plugins import toy_config, write_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, Path]:
    folder = tmp_path_factory.mktemp("front")
    return front_of(toy_config(write_task(folder)), folder / "fronts", images=48, best_of=(2, 4, 400))


def test_at_beta_zero_the_front_is_the_base_model(made: tuple[Front, Path], tmp_path: Path) -> None:
    front, _ = made
    config = toy_config(write_task(tmp_path))
    suite = MetricSuite(load_task(config.task))
    policy = load_configured_backbone(config)
    samples = draw_samples(policy, [f"eval {i}" for i in range(6)], suite, config.evaluation, 48, True)
    assert front.values(REWARD)[0] == pytest.approx(samples.rewards.mean(1))
    assert front.values(KL)[0] == pytest.approx(0, abs=1e-9)
    assert front.values(ESS)[0] == pytest.approx(48)


def test_reward_and_kl_rise_with_beta_and_effective_samples_fall(made: tuple[Front, Path]) -> None:
    front, _ = made
    assert len(front.strengths()) >= 6
    means = [front.values(name).mean(1) for name in (REWARD, KL, ESS)]
    assert (np.diff(means[0]) > 0).all()
    assert (np.diff(means[1]) > 0).all()
    assert (np.diff(means[2]) < 0).all()
    assert (np.median(front.values(ESS), axis=1) >= 4.8).all()
    assert "effective" in str(front.record.left_out) or "rises no further" in str(front.record.left_out)


def test_the_front_agrees_with_rejection_sampling(tmp_path: Path) -> None:
    """Images accepted with probability exp(beta (R - max R)) are images of the target, whatever the weights say."""
    config = toy_config(write_task(tmp_path), evaluation={"prompts": 2, "images_per_prompt": 2, "steps": 4})
    suite = MetricSuite(load_task(config.task))
    policy = load_configured_backbone(config)
    samples = draw_samples(policy, ["eval 0", "eval 1"], suite, config.evaluation, 3000, True)
    beta = 1.0 / float(samples.rewards.std(1).mean())
    front, _ = front_of(config, tmp_path / "fronts", images=200, betas=[beta], best_of=())
    rng, metric = np.random.default_rng(0), suite.evals["diversity"]
    assert isinstance(metric, SetMetric)
    for p, prompt in enumerate(samples.prompts):
        rewards = samples.rewards[p]
        accepted = np.flatnonzero(rng.random(3000) < np.exp(beta * (rewards - rewards.max())))
        pairs = accepted[: len(accepted) // 2 * 2].reshape(-1, 2)
        lgmd = np.array([metric.measure_read(samples.features["diversity"][p][0], pair, prompt)["lgmd"] for pair in pairs])
        # Four standard errors of the accepted ones and of the front's 200 samples.
        error = 4 * rewards[accepted].std() * (1 / len(accepted) + 1 / 100) ** 0.5
        assert front.values(REWARD)[1, p] == pytest.approx(rewards[accepted].mean(), abs=error)
        error = 4 * lgmd.std() * (1 / len(lgmd) + 1 / 50) ** 0.5
        assert front.values("lgmd")[1, p] == pytest.approx(lgmd.mean(), abs=error)


def test_best_of_n_is_beside_the_tilt_for_each_n_that_the_samples_allow(made: tuple[Front, Path]) -> None:
    front, _ = made
    assert front.strengths(BEST_OF) == [2, 4]
    base = front.values(REWARD)[0].mean()
    two, four = front.values(REWARD, BEST_OF).mean(1)
    assert base < two < four
    assert front.values(KL, BEST_OF)[0] == pytest.approx(np.log(2) - 1 / 2)


def test_the_summary_has_means_over_prompts(made: tuple[Front, Path]) -> None:
    front, _ = made
    table = summary(front)
    beta = front.strengths()[2]
    (row,) = table[(table.rule == TILT) & (table.strength == beta) & (table.metric == "lgmd")].to_dict("records")
    assert row["value"] == pytest.approx(front.values("lgmd")[2].mean())
    assert row["lower"] < row["value"] < row["upper"]


def test_a_front_is_made_once_for_the_same_content(made: tuple[Front, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    front, folder = made
    config = toy_config(folder.parent.parent / "toy.yaml")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn again")

    monkeypatch.setattr("alignbench.frontier.making.measure_front", never)
    again, same = front_of(config, folder.parent, images=48, best_of=(2, 4, 400))
    assert (same, again.record) == (folder, front.record)
    assert again.table.to_numpy().tolist() == front.table.to_numpy().tolist()
    assert (folder / "front.png").stat().st_size > 10_000
    other_noise = toy_config(folder.parent.parent / "toy.yaml", evaluation={**config.evaluation.model_dump(), "seed": 1})
    with pytest.raises(AssertionError, match="drawn again"):
        front_of(other_noise, folder.parent, images=48, best_of=(2, 4, 400))


def test_too_few_images_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs at least 6 samples of each, got 5; raise --images"):
        front_of(toy_config(write_task(tmp_path)), tmp_path, images=5)


def test_a_reward_that_is_the_same_everywhere_has_no_front(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is the same for all images of a prompt"):
        front_of(toy_config(write_task(tmp_path, "Constant")), tmp_path, images=8)


def test_a_damaged_front_is_refused(made: tuple[Front, Path], tmp_path: Path) -> None:
    _, folder = made
    assert read_front(tmp_path) is None
    for name in ("front.json", "front.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert read_front(tmp_path) is not None
    (tmp_path / "front.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"front.parquet"):
        read_front(tmp_path)
