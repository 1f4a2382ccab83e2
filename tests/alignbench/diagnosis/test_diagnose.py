"""Each number of a diagnosis, on groups for which the answer is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from alignbench import Plan, Sampler, Settings, Step, UserError, load_sampler
from alignbench.diagnosis.diagnose import diagnose
from alignbench.diagnosis.draws import Draws, Groups, draw_groups
from alignbench.diagnosis.estimators import (
    classifier_advantage,
    distances,
    log_means,
    partition_function,
    prefix_entropy,
    total_variation,
)
from alignbench.diagnosis.record import Diagnosis
from alignbench.errors import RunError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.records.record import Estimate
from alignbench.tasks import load_task
from alignbench.training.run import run
from tests.support.plugins import toy_config, write_task
from tests.support.toys import ToyBackbone


def groups_of(latents: np.ndarray, rewards: np.ndarray | None = None, log_prob: np.ndarray | None = None) -> Groups:
    """Latents [P, n, K, D]; rewards and log-probs are 0 if they do not matter."""
    zeros = np.zeros(latents.shape[:3])
    as_given = (zeros if values is None else values for values in (rewards, log_prob))
    return Groups(latents.astype(np.float32), *as_given)


def normal_groups(seed: int, shape: tuple[int, int, int, int] = (2, 60, 9, 3)) -> Groups:
    return groups_of(np.random.default_rng(seed).normal(size=shape))


def half_width(estimate: Estimate) -> float:
    assert estimate.lower is not None
    assert estimate.upper is not None
    return (estimate.upper - estimate.lower) / 2


def test_distances_are_grouped_by_where_two_leaves_diverge() -> None:
    line = np.array([0.0, 1.0, 10.0, 12.0])
    latents = np.tile(line[None, None, :, None], (1, 3, 1, 4))  # |z - z'| / sqrt(4) is the distance on the line
    shared = groups_of(latents)
    found = {d.apart_since: d for d in distances(Draws(shared, groups_of(2 * latents), shared, prefixes=(1, 2, 4)))}
    assert list(found) == ["split 1", "split 2"]
    assert found["split 2"].sampler.value == pytest.approx((1 + 2) / 2)
    assert found["split 1"].sampler.value == pytest.approx((10 + 12 + 9 + 11) / 4)
    assert found["split 1"].independent.value == pytest.approx(2 * (1 + 2 + 10 + 12 + 9 + 11) / 6)
    two_roots = {d.apart_since: d.sampler.value for d in distances(Draws(shared, shared, shared, prefixes=(2, 4)))}
    assert two_roots == pytest.approx({"root": (10 + 12 + 9 + 11) / 4, "split 1": 1.5})
    alone = {d.apart_since: d.sampler.value for d in distances(Draws(shared, shared, shared, prefixes=(4,)))}
    assert alone == pytest.approx({"root": (1 + 2 + 10 + 12 + 9 + 11) / 6})


def test_prefix_entropy_of_policy_and_target_by_hand() -> None:
    p = np.log(np.tile([1 / 2, 1 / 4, 1 / 8, 1 / 8], (1, 3, 1)))
    rewards = np.tile([1.0, -1.0, np.nan, np.nan], (1, 3, 1))
    shared = groups_of(np.zeros((1, 3, 4, 1)), rewards, p - 7.0)
    of_prefixes, of_leaves = prefix_entropy(Draws(shared, shared, shared, prefixes=(1, 2, 4)), beta=math.log(3) / 2)
    # Prefix masses 3/4 and 1/4; bits: 2 - 3/4 log2 3. Leaves: 1.75 of two bits.
    assert of_prefixes.policy.value == pytest.approx(2 - 0.75 * math.log2(3))
    assert of_leaves.policy.value == pytest.approx(1.75 / 2)
    # Standardised rewards 1 and -1: q = 3/4 and 1/4, both below the first prefix.
    assert of_prefixes.target.value == pytest.approx(0.0)
    assert of_leaves.target.value == pytest.approx((2 - 0.75 * math.log2(3)) / 2)


def test_the_advantage_between_shifted_normals_is_their_total_variation() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, 2000, 1, 3))
    one[..., 1] += 1.5
    # The best classifier is linear: TV = 2 Phi(1.5 / 2) - 1. Four standard errors of 2000 judged pairs.
    found = classifier_advantage(one, other)
    assert found.shape == (2, 1000)
    assert found.mean() == pytest.approx(2 * stats.norm.cdf(0.75) - 1, abs=4 * (0.5 / 2000) ** 0.5)


def test_the_advantage_of_equal_distributions_is_zero_as_often_as_its_interval_says() -> None:
    scores = []
    for seed in range(100):
        one, other = np.random.default_rng(seed).normal(size=(2, 3, 40, 1, 6))
        found = classifier_advantage(one, other)
        scores.append(found.mean() / (found.std() / found.size**0.5))
    # Standard normal: deviation 1 with an error of 7 %.
    assert np.std(scores) == pytest.approx(1.0, abs=0.25)
    assert abs(np.mean(scores)) < 0.4


def test_prompts_that_differ_do_not_help_the_classifier() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, 400, 1, 2)) + np.array([0.0, 50.0])[:, None, None, None]
    assert abs(classifier_advantage(one, other).mean()) < 4 * (0.5 / 400) ** 0.5


def test_total_variation_detects_other_leaf_distributions_and_correlated_leaves() -> None:
    one, other = normal_groups(0), normal_groups(1)
    same = total_variation(Draws(one, other, other, prefixes=(9,)))
    for found in (same.leaf, same.group):
        assert found.value is not None
        assert abs(found.value) < 2 * half_width(found)
    louder = groups_of(normal_groups(2).latents * 1.5)
    assert total_variation(Draws(louder, other, other, prefixes=(9,))).leaf.lower > 0.05  # type: ignore[operator]
    # Single leaves have the same distribution: a common part and an own part, with variances that sum to one.
    common = np.random.default_rng(3).normal(size=(2, 60, 1, 3))
    together = groups_of(np.sqrt(0.5) * (common + normal_groups(4).latents))
    apart = total_variation(Draws(together, other, other, prefixes=(9,)))
    assert apart.group.lower > 0.5  # type: ignore[operator]
    assert apart.leaf.value == pytest.approx(0, abs=2 * half_width(apart.leaf))


def test_log_means_over_parts_of_groups_and_over_several_groups() -> None:
    weights = np.array([[[1.0, 2.0, 3.0, 6.0], [2.0, np.nan, 2.0, 8.0]]])
    # One leaf below each of two prefixes: leaves 0 and 2, 1 and 3; missing ones are left out.
    logs = np.log([[2.0, 4.0], [2.0, 8.0]])
    assert log_means(weights, 2)[0] == pytest.approx(np.stack([logs.mean(1), logs.var(1)], axis=1))
    assert log_means(weights, 4)[0] == pytest.approx(np.array([[math.log(3), 0.0], [math.log(4), 0.0]]))
    assert log_means(weights, 8)[0] == pytest.approx(np.array([[math.log(24 / 7), 0.0]]))
    assert np.isnan(log_means(np.full((1, 1, 2), np.nan), 2)).all()


def coins(seed: int, copies: int = 1, rounds: int = 400) -> Groups:
    """Rewards that are 0 or 1 with equal chances, in runs of `copies` equal ones among the nine of a group."""
    drawn = np.random.default_rng(seed).integers(0, 2, size=(4, rounds, 9 // copies))
    rewards = np.repeat(drawn, copies, axis=-1).astype(float)
    return groups_of(np.zeros((*rewards.shape, 1)), rewards)


def exact_bias(k: int, beta: float) -> float:
    """E log((1/K) sum exp(beta z)) - log E exp(beta z) for K independent z = +-1."""
    heads = np.arange(k + 1)
    means = (heads * math.exp(beta) + (k - heads) * math.exp(-beta)) / k
    return float((stats.binom.pmf(heads, k, 0.5) * np.log(means)).sum() - math.log(math.cosh(beta)))


def test_the_bias_of_log_z_is_that_of_the_binomial_sum_and_falls_as_one_over_k() -> None:
    points, slopes = partition_function(Draws(coins(0), coins(1), coins(2), prefixes=(1, 3, 9)), beta=1.0)
    assert [(p.k, p.pooled_groups) for p in points] == [(3, 1), (9, 1), (27, 3), (81, 9)]
    for point in points:
        for found in (point.sampler_bias, point.independent_bias):
            # Two half-widths of 95 % are four standard errors.
            assert found.value == pytest.approx(exact_bias(point.k, 1.0), abs=2 * half_width(found))
    of = {(s.of, s.quantity): s for s in slopes}
    assert of["independent", "deviation"].sizes == [3, 9, 27, 81]
    assert of["independent", "deviation"].slope.value == pytest.approx(-0.5, abs=0.12)  # the log is not linear at K = 3
    expected = math.log(exact_bias(9, 1.0) / exact_bias(3, 1.0)) / math.log(3)
    assert of["sampler", "bias"].sizes == [3, 9]
    assert of["sampler", "bias"].slope.value == pytest.approx(expected, abs=2 * half_width(of["sampler", "bias"].slope))


def test_repeated_leaves_do_not_reduce_the_bias() -> None:
    # Three distinct leaves, each three times: nine leaves hold no more information than three.
    points, slopes = partition_function(Draws(coins(0, copies=3), coins(1), coins(2), prefixes=(1, 3, 9)), beta=1.0)
    three, nine, *_ = points
    assert three.sampler_bias.value == pytest.approx(nine.sampler_bias.value)
    assert nine.sampler_bias.value == pytest.approx(exact_bias(3, 1.0), abs=2 * half_width(nine.sampler_bias))
    assert next(s for s in slopes if s.of == "sampler" and s.quantity == "deviation").slope.value == pytest.approx(0, abs=1e-9)


def test_equal_rewards_have_no_bias_and_no_slope() -> None:
    same = groups_of(np.zeros((2, 40, 9, 1)), np.full((2, 40, 9), 0.7))
    points, slopes = partition_function(Draws(same, same, same, prefixes=(9,)), beta=2.0)
    assert [p.k for p in points] == [3, 9, 27]  # 81 would leave four pools
    assert {p.sampler_bias.value for p in points} == {p.sampler_deviation.value for p in points} == {0.0}
    assert {s.slope.value for s in slopes} == {None}


def test_a_diagnosis_is_a_record_and_a_figure_and_counts_its_costs(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), sampler={"name": "fixed_tree", "steps": 5, "levels": 2, "splits": [1, 2]})
    rounds: list[tuple[int, int]] = []
    found = diagnose(config, tmp_path / "out", prompts=2, rounds=8, advance=lambda *done: rounds.append(done))
    assert rounds == [(i, 8) for i in range(1, 9)]
    assert Diagnosis.model_validate(json.loads((tmp_path / "out" / "diagnosis.json").read_text())) == found
    assert (found.schema_version, found.groups, found.group_size, len(found.prompts)) == (1, 8, 9, 2)
    # 1 + 1 + 3 + 9 + 9 rows of the tree, twice 9 chains of five steps.
    assert found.model_rows == 2 * 8 * (23 + 2 * 45)
    assert found.reward_calls == 2 * 8 * 27
    assert [d.apart_since for d in found.distances] == ["split 1", "split 2"]
    assert (tmp_path / "out" / "diagnosis.png").is_file()
    with pytest.raises(UserError, match="exists already"):
        diagnose(config, tmp_path / "out", prompts=2, rounds=8)


def test_a_runs_policy_is_diagnosed_in_place_of_the_base_model(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), optimizer={"lr": 0.1})
    run(config, tmp_path / "run")
    base = diagnose(config, tmp_path / "base", prompts=2, rounds=8)
    trained = diagnose(config, tmp_path / "trained", run=tmp_path / "run", prompts=2, rounds=8)
    assert (base.checkpoint, base.iteration, trained.checkpoint, trained.iteration) == (None, None, str(tmp_path / "run"), 3)
    assert trained.distances[0].sampler.value != base.distances[0].sampler.value
    with pytest.raises(UserError, match="has no checkpoint"):
        diagnose(config, tmp_path / "other", run=tmp_path / "base", prompts=2, rounds=8)
    assert not (tmp_path / "other").exists()


def test_scores_are_those_of_the_reward_that_a_run_trains_on(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), reward={"brightness": 0.0})
    with pytest.raises(UserError, match="every reward has weight 0"):
        diagnose(config, tmp_path / "out", prompts=2, rounds=8)
    config = toy_config(write_task(tmp_path), scorer_url="http://127.0.0.1:9", scorer_token_file=tmp_path / "missing")
    with pytest.raises(UserError, match="token file"):
        diagnose(config, tmp_path / "out", prompts=2, rounds=8)


def test_missing_scores_are_counted_and_a_prompt_without_any_stops_it(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path, "Sometimes"), sampler={"name": "independent", "steps": 3, "group_size": 6})
    found = diagnose(config, tmp_path / "out", prompts=2, rounds=8)
    assert found.failed_scores == found.reward_calls // 3
    assert all(p.sampler_bias.value is not None for p in found.partition)


@pytest.mark.filterwarnings("error")
def test_a_constant_reward_is_reported_and_drawn_without_a_slope(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path, "Constant"), sampler={"name": "independent", "steps": 3, "group_size": 3})
    found = diagnose(config, tmp_path / "out", prompts=2, rounds=8)
    assert {p.independent_bias.value for p in found.partition} == {0.0}
    assert all(s.slope.value is None for s in found.slopes)
    assert (tmp_path / "out" / "diagnosis.png").is_file()


class Fickle(Sampler):
    """A group of two or of three."""

    Settings = Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return Plan((Step("cps", 0.5), Step()), roots=int(rng.integers(2, 4)))


class Lonely(Sampler):
    """A group of one."""

    Settings = Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return Plan((Step("cps", 0.5), Step()))


class Mute:
    """Gives NaN for every image."""

    weights = {"mute": 1.0}  # noqa: RUF012

    def score(self, images: np.ndarray, prompts: list[str], *, when: str) -> dict[str, np.ndarray]:
        return {"mute": np.full(len(images), np.nan)}


def test_groups_of_different_sizes_are_refused(tmp_path: Path) -> None:
    judges = MetricSuite(load_task(str(write_task(tmp_path))))
    with pytest.raises(UserError, match=r"must have the same group structure to be compared; got \(.,\) and \(.,\)"):
        draw_groups(ToyBackbone(), Fickle(Settings()), judges, ["a"], 8)


def test_groups_of_one_are_refused() -> None:
    with pytest.raises(UserError, match="a group of one rollout cannot be compared with anything"):
        draw_groups(ToyBackbone(), Lonely(Settings()), Mute(), ["a"], 8)  # type: ignore[arg-type]


def test_a_prompt_without_a_single_score_is_named() -> None:
    sampler = load_sampler("independent", steps=2, group_size=2)
    with pytest.raises(RunError, match="no image of the prompt 'a' could be scored"):
        draw_groups(ToyBackbone(), sampler, Mute(), ["a"], 2)  # type: ignore[arg-type]


def test_shared_independent_and_reference_groups_have_noise_of_their_own(tmp_path: Path) -> None:
    judges = MetricSuite(load_task(str(write_task(tmp_path))))
    drawn = draw_groups(ToyBackbone(), load_sampler("independent", steps=3, group_size=2), judges, ["a"], 3)
    parts = (drawn.shared, drawn.independent, drawn.reference)
    every = torch.cat([torch.from_numpy(part.latents).flatten(0, 2) for part in parts])
    assert len(every) == 18
    assert float(torch.pdist(every).min()) > 0.1
