"""Planted losses are what they say, and nothing else changes."""

import numpy as np
import pytest
import torch

from alignbench.embedded.drawing.scenes import Scene, Shape
from alignbench.trial.own_images import read_colors
from alignbench.trial.pools import DRAWN, EQUAL, EVERYTHING, FREE, TREATMENTS, Pool, behind, drawn_pool, treated
from alignbench.trial.subjects import Subject, subjects


def pool_of(subject: Subject) -> Pool:
    return drawn_pool(subject, lambda images: torch.zeros(len(images), 1), np.random.default_rng(5))


@pytest.fixture(scope="module")
def word() -> Pool:
    return pool_of(subjects(1, np.random.default_rng(0))[0])


def test_subjects_are_words_and_shapes_with_the_attributes_to_lose() -> None:
    values = [set(subject.values) for subject in subjects(3, np.random.default_rng(0))]
    assert values == [
        {"color", "place", "size", "background", "font"},
        {"color", "place", "size", "background"},
        {"color", "background", "count"},
    ]


def test_an_attribute_collapses_alone(word: Pool) -> None:
    for attribute in word.labels:
        collapsed = word.conditions[attribute].collapsed
        assert len(set(word.labels[attribute][collapsed])) == 1
        assert all(len(set(labels[collapsed])) > 1 for other, labels in word.labels.items() if other != attribute)


def test_everything_collapses_together_and_behind_a_treatment_too(word: Pool) -> None:
    for condition in (EVERYTHING, behind("noise"), behind("more contrast")):
        collapsed = word.conditions[condition].collapsed
        assert all(len(set(labels[collapsed])) == 1 for labels in word.labels.values())


def test_a_degree_is_the_share_of_collapsed_images(word: Pool) -> None:
    rng = np.random.default_rng(1)
    collapsed = set(word.conditions["color"].collapsed.tolist())
    shares = []
    for _ in range(400):
        free = word.draw_free(8, rng)
        chosen = word.draw_treated("color", 0.25, free, rng)
        assert chosen is not None
        assert not set(chosen.tolist()) & set(free.tolist())
        shares.append(np.mean([i in collapsed for i in chosen.tolist()]))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03)  # four standard errors


def test_a_set_that_the_pool_is_too_small_for_is_not_drawn(word: Pool) -> None:
    rng = np.random.default_rng(1)
    assert word.draw_treated(EQUAL, 0, word.draw_free(FREE // 2, rng), rng) is not None
    assert word.draw_treated(EQUAL, 0, word.draw_free(FREE // 2 + 1, rng), rng) is None


def test_treatments_change_pixels_and_keep_the_mean() -> None:
    image = Scene("sky", (Shape("circle", "blue", (32.0, 32.0), 32.0),)).draw()[None]
    for treatment in TREATMENTS:
        changed = treated(image, np.random.default_rng(0), treatment)
        assert changed.dtype == np.uint8
        assert np.abs(changed.astype(int) - image).mean() > 0.5
        assert changed.mean() == pytest.approx(image.mean(), abs=2)
    spread = {name: treated(image, np.random.default_rng(0), name).std() / image.std() for name in TREATMENTS}
    assert spread["less contrast"] == pytest.approx(0.7, abs=0.02)
    assert spread["blur"] < 1 < spread["more contrast"]


def test_colors_are_read_from_plain_pixels() -> None:
    assert read_colors(Scene("mint", (Shape("square", "purple", (20.0, 40.0), 32.0),)).draw()) == ("mint", "purple")
    assert pool_of(subjects(2, np.random.default_rng(0))[1]).source == DRAWN
