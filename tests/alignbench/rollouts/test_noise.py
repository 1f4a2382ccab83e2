import pytest
import torch

from alignbench.rollouts.noise import group_keys, normal, seed_of


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    # Recorded once; a change would make old records irreproducible.
    assert seed_of(0, 0, "a red circle", 0, "root", 0) == 2989135660761171121
    assert seed_of("x") == 8781247417869548755


def test_a_seed_is_a_63_bit_number() -> None:
    assert all(0 <= seed_of(i) < 2**63 for i in range(200))


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), ("1",)), (("a", "b"), ("ab",)), ((1, 23), (12, 3)), ((0, 1), (1, 0)), (("a",), ("a", 0))],
)
def test_keys_that_differ_in_part_type_or_order_have_different_seeds(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert seed_of(*one) != seed_of(*other)


def test_a_group_key_counts_how_often_its_prompt_occurred_before() -> None:
    assert group_keys(["a", "b", "a", "a"]) == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]


def test_a_rows_noise_does_not_depend_on_the_other_rows() -> None:
    keys = [("p", i) for i in range(6)]
    together = normal(keys, (3, 4))
    assert together.shape == (6, 3, 4)
    assert together.dtype == torch.float32
    for i in (0, 3, 5):
        assert torch.equal(normal([keys[i]], (3, 4))[0], together[i])
    assert torch.equal(normal(keys[::-1], (3, 4)), together.flip(0))


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    normal([("p", 0)], (4,))
    assert torch.equal(torch.randn(2), expected)


def test_noise_of_different_keys_is_standard_normal_and_uncorrelated() -> None:
    rows = normal([("p", i) for i in range(400)], (100,)).double()
    # Four standard errors of 40000 draws: 4 / 200 for the mean, 4 sqrt(2) / 200 for the variance.
    assert float(rows.mean()) == pytest.approx(0, abs=0.02)
    assert float(rows.var()) == pytest.approx(1, abs=0.03)
    # Neighbouring keys: 399 correlations with standard error 1/10 average to 0 within 4 / (10 sqrt 399).
    assert float((rows[1:] * rows[:-1]).mean()) == pytest.approx(0, abs=0.02)


def test_no_keys_give_an_empty_tensor() -> None:
    assert normal([], (2, 3)).shape == (0, 2, 3)
