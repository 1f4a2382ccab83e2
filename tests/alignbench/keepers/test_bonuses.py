"""Bonuses for diversity, by numbers computed by hand, and in whole iterations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import UserError, run
from alignbench.config.keepers import KeepersConfig
from alignbench.keepers.bonuses import (
    Bonuses,
    cluster_bonus,
    concentrated,
    distance_bonus,
    measured_distances,
    spectral_clusters,
)
from tests.alignbench.training.test_trainer import trainer, watched
from tests.support.plugins import toy_config, write_task

ROOT2 = 2**0.5


def on_a_line(*places: float) -> np.ndarray:
    points = np.array(places)
    return np.abs(points[:, None] - points)


# --- bonuses


def test_three_images_in_clusters_of_two_and_one_have_the_published_bonuses() -> None:
    found = cluster_bonus(spectral_clusters(on_a_line(0.0, 0.1, 5.0), 0.3))
    assert found == pytest.approx([1.225, 1.225, 1.732], abs=5e-4)  # sqrt(3 / 2), sqrt(3 / 2), sqrt 3


@pytest.mark.parametrize(
    ("places", "bonuses"),
    [
        ((0.0, 0.1, 9.0, 9.1), [ROOT2] * 4),
        ((9.1, 0.0, 9.0, 9.05, 0.1), [(5 / 3) ** 0.5, 2.5**0.5, (5 / 3) ** 0.5, (5 / 3) ** 0.5, 2.5**0.5]),
        ((2.0, 2.0, 2.0), [1.0] * 3),  # one cluster of equal images
        ((2.0, 2.0, 2.0, 3.0), [(4 / 3) ** 0.5] * 3 + [2.0]),  # the median distance is 0
        ((0.0, 1.0), [ROOT2] * 2),
    ],
)
def test_a_rare_image_has_a_larger_bonus_whatever_the_order(places: tuple[float, ...], bonuses: list[float]) -> None:
    assert cluster_bonus(spectral_clusters(on_a_line(*places), 0.3)) == pytest.approx(bonuses)


def test_the_number_of_clusters_can_be_given() -> None:
    places = on_a_line(0.0, 0.1, 0.5, 9.0, 9.1)
    assert cluster_bonus(spectral_clusters(places, 0.3)) == pytest.approx([(5 / 3) ** 0.5] * 3 + [2.5**0.5] * 2)
    assert len(set(spectral_clusters(places, 0.01, 3))) == 3


def test_clusters_do_not_depend_on_the_unit_of_the_distances() -> None:
    distances = on_a_line(*np.random.default_rng(0).normal(size=12))
    one, other = (cluster_bonus(spectral_clusters(scale * distances, 0.3)) for scale in (1.0, 1e-6))
    assert one == pytest.approx(other)


def test_the_distance_bonus_is_an_images_mean_distance_over_the_groups() -> None:
    # Mean distances 3, 2 and 4 of three images at 1, 5 and 3 from each other.
    distances = np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 3.0], [5.0, 3.0, 0.0]])
    assert distance_bonus(distances).tolist() == [0.0, -1.0, 1.0]
    assert distance_bonus(on_a_line(0.0, 4.0)).tolist() == [0.0, 0.0]


def test_the_distance_bonus_is_a_difference_of_potentials() -> None:
    n = 6
    distances = on_a_line(*np.random.default_rng(1).normal(size=n))

    def potential(members: list[int]) -> float:
        return float(np.mean([distances[i, j] for i in members for j in members if i < j]))

    falls = [potential(list(range(n))) - potential([k for k in range(n) if k != i]) for i in range(n)]
    assert falls == pytest.approx(2 / (n - 2) * distance_bonus(distances))


@pytest.mark.parametrize(
    ("rewards", "share", "kept"),
    [
        ([0.0, 1.0, 2.0, 10.0], 0.75, [0.0, 1.0, 2.0, None]),  # median 1.5
        ([0.0, 1.0, 2.0, 10.0], 0.5, [None, 1.0, 2.0, None]),
        ([0.0, 1.0, 2.0, 10.0], 0.01, [None, 1.0, 2.0, None]),  # two at least
        ([0.0, 1.0, 2.0, 3.0, 20.0], 0.4, [None, 1.0, 2.0, None, None]),  # the mean, 5.2, would keep 2 and 3
        ([None, 1.0, 2.0, 10.0], 0.5, [None, 1.0, 2.0, None]),  # two of three, rounded up
        ([3.0, 3.0, 3.0, 3.0], 0.5, [3.0, 3.0, None, None]),
        ([None, None], 0.5, [None, None]),
    ],
)
def test_the_rewards_nearest_to_the_median_are_kept(rewards: list[Any], share: float, kept: list[Any]) -> None:
    as_numbers = [[float("nan") if v is None else v for v in values] for values in (rewards, kept)]
    found = concentrated(torch.tensor(as_numbers[:1], dtype=torch.float64), share)
    assert torch.equal(found.nan_to_num(-1), torch.tensor(as_numbers[1:], dtype=torch.float64).nan_to_num(-1))


def test_distances_of_an_eval_are_what_it_gives_for_two_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    latents = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    known = {"pixels": KeepersConfig(distance_bonus=1, distance="pixels")}
    known["eval"] = KeepersConfig(distance_bonus=1, distance="diversity", distance_metric="pixel_diversity")
    one, other = (measured_distances(config)(images, latents, "x") for config in known.values())
    assert one == pytest.approx(other)
    latent = measured_distances(KeepersConfig(distance_bonus=1))(images, latents, "x")
    assert latent[0, 1] == pytest.approx(float((latents[0] - latents[1]).square().mean().sqrt()))


def test_groups_whose_distances_are_not_known_get_no_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    bonuses = Bonuses(KeepersConfig(cluster_bonus=2.0, distance_bonus=1.0))
    unknown = np.full((3, 3), np.nan)
    monkeypatch.setattr(bonuses, "distances", lambda i, z, prompt: unknown if prompt == "b" else on_a_line(0.0, 0.1, 5.0))
    found = bonuses.measure(np.zeros((6, 2, 2, 3), np.uint8), torch.zeros(6, 1), ["a", "b"], when="now")
    assert found["cluster_bonus"] == pytest.approx([1.5**0.5] * 2 + [3**0.5] + [0.0] * 3)
    added = bonuses.added(torch.zeros(2, 3), {n: torch.from_numpy(v).view(2, 3) for n, v in found.items()})
    # Distances 0.1, 5 and 4.9: means 2.55, 2.5 and 4.95, whose mean is 10 / 3.
    of_distance = np.array([2.55, 2.5, 4.95]) - 10 / 3
    assert added[0].tolist() == pytest.approx((2 * np.array([1.5**0.5] * 2 + [3**0.5]) + of_distance).tolist())
    assert added[1].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({"clusters": 3}, ["keepers.clusters has no effect: keepers.cluster_bonus is 0"]),
        ({"distance": "pixels"}, ["keepers.distance has no effect: keepers.cluster_bonus and keepers.distance_bonus are 0"]),
        ({"data_images": 3}, ["keepers.data_images has no effect: keepers.data is 0"]),
        ({"distance_bonus": 1, "distance": "pixels"}, []),
        ({}, []),
    ],
)
def test_a_setting_that_nothing_reads_is_named(settings: dict[str, Any], sentences: list[str]) -> None:
    assert KeepersConfig(**settings).without_effect() == sentences


def test_a_metric_without_an_eval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keepers\.distance=latents is none"):
        toy_config(write_task(tmp_path), keepers={"distance_bonus": 1, "distance_metric": "vendi"})


def test_an_eval_that_measures_no_pair_or_several_things_is_refused() -> None:
    with pytest.raises(UserError, match=r"keepers\.distance=pickscore does not measure the diversity of two images"):
        measured_distances(KeepersConfig(distance_bonus=1, distance="pickscore"))
    unclear = measured_distances(KeepersConfig(distance_bonus=1, distance="diversity"))
    with pytest.raises(UserError, match="distance_metric must be one of pixel_diversity, lgmd"):
        unclear(np.zeros((2, 4, 4, 3), np.uint8), torch.zeros(2, 1), "x")


def test_keepers_that_can_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objective none does not train, so keepers have no effect"):
        run(toy_config(write_task(tmp_path), objective="none", keepers={"data": 0.1}), tmp_path / "out")


# --- in a training


def test_bonuses_are_added_to_the_reward_and_outliers_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path), keepers={"distance_bonus": 0.5, "reward_share": 0.75})
    seen = watched(made, monkeypatch)
    row = made.iterate()
    forest = seen[0]
    raw = forest.by_group(forest.scores["brightness"])
    z = forest.leaf_latents.view(2, 4, -1)
    distances = torch.cdist(z, z).double() / z.shape[2] ** 0.5
    means = distances.sum(2) / 3
    expected = raw + 0.5 * (means - means.mean(1, keepdim=True))
    kept = ~forest.by_group(forest.rewards).isnan()
    assert kept.sum(1).tolist() == [3, 3]
    torch.testing.assert_close(forest.by_group(forest.rewards)[kept], expected[kept], atol=1e-6, rtol=0)
    assert (row["failed_scores"], made.budget.failed_scores, made.budget.reward_calls) == (0, 0, 8)
    assert row["reward_brightness"] == pytest.approx(float(raw.mean()))


def test_without_keepers_rewards_are_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path))
    seen = watched(made, monkeypatch)
    made.iterate()
    assert torch.equal(seen[0].rewards, seen[0].scores["brightness"])
    assert seen[0].bonuses == {}
    assert made.updater.data is None


def test_bonuses_of_a_part_of_the_prompts_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = []
    for overlap in (1, 2):
        made = trainer(write_task(tmp_path), overlap=overlap, keepers={"cluster_bonus": 1.0})
        seen = watched(made, monkeypatch)
        made.iterate()
        rewards.append(seen[0].rewards)
    torch.testing.assert_close(*rewards)
