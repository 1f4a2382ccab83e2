import numpy as np

from alignbench.verification.ranking import letter_groups


def test_methods_that_are_apart_beyond_chance_share_no_letter() -> None:
    close = [np.array([0.50, 0.52, 0.54]), np.array([0.51, 0.52, 0.53])]
    far = [np.array([0.90, 0.91, 0.92])]
    assert letter_groups([*far, *close]) == ["a", "b", "b"]


def test_a_method_between_two_others_may_have_the_letters_of_both() -> None:
    # Neighbours are 0.1 apart with intervals of that size; the two ends are 0.2 apart.
    samples = [centre + np.array([-0.06, -0.02, 0.02, 0.06]) for centre in (0.9, 0.8, 0.7)]
    assert letter_groups(samples) == ["a", "a b", "b"]


def test_a_single_seed_is_apart_from_nothing() -> None:
    assert letter_groups([np.array([0.9]), np.array([0.1, 0.1001])]) == ["a", "a"]
    assert letter_groups([]) == []
