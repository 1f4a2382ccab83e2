import math

import pytest
import torch
from torch import Tensor

from alignbench import flow
from alignbench.errors import NonFiniteError
from alignbench.rollouts.plan import Rule

# Numbers in this file are worked out by hand to six decimals.
ROUNDED = 2e-6


def one(value: float, dimensions: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch of one state whose dimensions all have this value."""
    return torch.full((1, dimensions), value, dtype=dtype)


@pytest.mark.parametrize(
    ("rule", "x", "sigma", "sigma_next", "level", "mean", "std"),
    [
        # 1 - .25 * 2
        pytest.param("ode", 1.0, 0.5, 0.25, 0.0, 0.5, 0.0, id="ode"),
        # std_t = .8, drift = .64: 1 (1 - .16) - .25 * 2 (1 + .32); std .8 sqrt .25
        pytest.param("sde", 1.0, 0.5, 0.25, 0.8, 0.18, 0.4, id="sde"),
        # The first denominator is 1 - sigma_next: std_t^2 = .64 / .25, drift 1.28: 1 (1 - .32) - .5; std 1.6 sqrt .25
        pytest.param("sde", 1.0, 1.0, 0.75, 0.8, 0.18, 0.8, id="sde from pure noise"),
        # 1 (1 - .32) - .5 * 2 (1.32); std .8 sqrt .5
        pytest.param("sde", 1.0, 0.5, 0.0, 0.8, -0.64, 0.565685, id="sde to the image"),
        # std_t^2 = .64: 1 (1 - .32) - 2
        pytest.param("sde", 1.0, 1.0, 0.0, 0.8, -1.32, 0.8, id="sde in a single step"),
        # sin(pi/6) = 1/2: std .125; x0 = 1, x1 = 3: .75 + 3 sqrt(.25^2 - .125^2)
        pytest.param("cps", 2.0, 0.5, 0.25, 1 / 3, 1.399519, 0.125, id="cps"),
        # x0 = 2 - 2, x1 = 2: 2 sqrt(.75^2 - .375^2)
        pytest.param("cps", 2.0, 1.0, 0.75, 1 / 3, 1.299038, 0.375, id="cps from pure noise"),
        # x0 = 0, score = -4: .5 - .08 * 4 * .25; std .4 sqrt .25
        pytest.param("dance", 1.0, 0.5, 0.25, 0.4, 0.42, 0.2, id="dance"),
        # score = -1: 1 - .5 - .08 * .25
        pytest.param("dance", 1.0, 1.0, 0.75, 0.4, 0.48, 0.2, id="dance from pure noise"),
        # 1 - 1 - .08 * 4 * .5; std .4 sqrt .5
        pytest.param("dance", 1.0, 0.5, 0.0, 0.4, -0.16, 0.282843, id="dance to the image"),
    ],
)
def test_mean_and_deviation_of_each_rule_at_velocity_2(
    rule: Rule, x: float, sigma: float, sigma_next: float, level: float, mean: float, std: float
) -> None:
    result = flow.step(one(x), one(2.0), sigma, sigma_next, level, rule, noise=one(0.0))
    assert result.mean.item() == pytest.approx(mean, abs=ROUNDED)
    assert float(result.std) == pytest.approx(std, abs=ROUNDED)
    assert result.x_next.item() == pytest.approx(mean, abs=ROUNDED)


def test_the_next_state_is_mean_plus_std_times_noise_with_its_gaussian_log_density() -> None:
    noise = torch.tensor([[1.0, 2.0]])
    # Per dimension: -noise^2 / 2 - log .4 - log(2 pi) / 2 = -.5 - .002648 and -2 - .002648.
    averaged = flow.step(one(1.0, 2), one(2.0, 2), 0.5, 0.25, 0.8, "sde", noise=noise)
    summed = flow.step(one(1.0, 2), one(2.0, 2), 0.5, 0.25, 0.8, "sde", noise=noise, reduction="sum")
    assert averaged.x_next.flatten().tolist() == pytest.approx([0.58, 0.98], abs=ROUNDED)
    assert averaged.log_prob.tolist() == pytest.approx([-1.252648], abs=ROUNDED)
    assert summed.log_prob.tolist() == pytest.approx([-2.505295], abs=ROUNDED)


def test_log_prob_is_averaged_by_default() -> None:
    y, mean, std = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])
    # -.5 - log 2 - .918939 and 0 - log 2 - .918939.
    assert flow.log_prob(y, mean, std).tolist() == pytest.approx([-1.862086], abs=ROUNDED)
    assert flow.log_prob(y, mean, std, reduction="sum").tolist() == pytest.approx([-3.724171], abs=ROUNDED)


def test_an_ode_step_has_no_density() -> None:
    result = flow.step(one(1.0, 3), one(2.0, 3), 0.5, 0.25, rule="ode")
    assert result.log_prob.tolist() == [0.0]
    assert float(result.std) == 0.0


def test_each_batch_row_may_have_its_own_sigmas_and_noise_level() -> None:
    x, v = torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)
    sigma, sigma_next = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0.25, 0.75, 0.0])
    mean, std = flow.moments(x, v, sigma, sigma_next, torch.tensor([0.8, 0.8, 0.8]), "sde")
    assert mean[:, 0, 0].tolist() == pytest.approx([0.18, 0.18, -0.64], abs=ROUNDED)
    assert std.flatten().tolist() == pytest.approx([0.4, 0.8, 0.565685], abs=ROUNDED)
    assert torch.equal(mean, mean[:, :1, :1].expand_as(mean))


@pytest.mark.parametrize("level", [0.2, 0.7, 1.0])
def test_cps_keeps_the_coefficients_of_picture_and_noise(level: float) -> None:
    # With the exact velocity of a single image, the next state must be (1 - s') x0 + s' times unit noise.
    x0, x1 = torch.tensor([[0.5, -1.5]]), torch.tensor([[1.0, 0.25]])
    sigma, sigma_next = 0.6, 0.35
    mean, std = flow.moments((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, level, "cps")
    kept = (mean - (1 - sigma_next) * x0) / x1
    assert (kept**2 + std**2).flatten().tolist() == pytest.approx([sigma_next**2] * 2, abs=ROUNDED)


@pytest.mark.parametrize("rule", ["sde", "dance"])
def test_sde_rules_tend_to_the_ode_as_the_noise_level_falls(rule: Rule) -> None:
    mean, std = flow.moments(one(1.0), one(2.0), 0.5, 0.25, 1e-4, rule)
    assert mean.item() == pytest.approx(0.5, abs=1e-6)
    assert 0 < float(std) < 1e-4


def test_the_first_sde_step_from_pure_noise_is_bounded() -> None:
    sigmas = flow.sigmas(10)
    result = flow.step(one(1.0, 4), one(2.0, 4), float(sigmas[0]), float(sigmas[1]), 0.7, "sde", noise=one(3.0, 4))
    # std_t = .7 sqrt(1 / .1), times sqrt .1: exactly eta.
    assert float(result.std) == pytest.approx(0.7, abs=1e-5)
    assert result.x_next.abs().max().item() < 5


def test_a_memoryless_step_is_the_posterior_given_the_predicted_image() -> None:
    """x_s = (1 - s) x_0 + s eps: the distribution of x_q given x_s and x_0, by the product of two Gaussians."""
    sigma, sigma_next, x0, x1 = 0.6, 0.35, 0.8, -0.4
    x = (1 - sigma) * x0 + sigma * x1
    mean, std = flow.moments(one(x), one(x1 - x0), sigma, sigma_next, 1.0, "memoryless")
    r = (1 - sigma) / (1 - sigma_next)
    likelihood, prior = sigma**2 - r**2 * sigma_next**2, sigma_next**2
    variance = 1 / (1 / prior + r**2 / likelihood)
    assert std.item() == pytest.approx(variance**0.5, abs=1e-6)
    assert mean.item() == pytest.approx(variance * ((1 - sigma_next) * x0 / prior + r * x / likelihood), abs=1e-6)


def test_a_memoryless_step_from_pure_noise_keeps_nothing_of_it() -> None:
    # At sigma = 1 the state is the noise x_1; the velocity x_1 - x_0 is of the predicted image 0.3.
    for noise in (-2.0, 0.0, 1.5):
        mean, std = flow.moments(one(noise), one(noise - 0.3), 1.0, 0.8, 1.0, "memoryless")
        assert (mean.item(), std.item()) == pytest.approx((0.2 * 0.3, 0.8), abs=1e-6)


def test_memoryless_steps_become_sde_at_root_two_as_they_shrink() -> None:
    for step in (1e-2, 1e-3):
        numbers = one(0.7), one(1.1), 0.5, 0.5 - step
        first = flow.moments(*numbers, 1.0, "memoryless")
        second = flow.moments(*numbers, 2**0.5, "sde")
        # Deviations differ by a share of the order of the step, means by its square.
        assert float(first[1] / second[1]) == pytest.approx(1, abs=5 * step)
        assert first[0].item() == pytest.approx(second[0].item(), abs=20 * step**2)


@pytest.mark.parametrize("rule", ["sde", "cps", "dance"])
def test_noise_level_zero_is_an_error_that_names_sigmas_and_dtype(rule: Rule) -> None:
    with pytest.raises(NonFiniteError, match=rf"{rule} step from sigma 0.5 to 0.25 .*with eta 0.0.*torch.float16"):
        flow.step(one(1.0), one(2.0, dtype=torch.float16), 0.5, 0.25, 0.0, rule)


def test_a_memoryless_step_to_the_image_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NonFiniteError, match=r"memoryless step from sigma 0.5 to 0.0 .*use rule 'ode'"):
        flow.step(one(1.0), one(2.0), 0.5, 0.0, 1.0, "memoryless")


def test_cps_to_the_picture_is_an_error_that_names_sigmas_and_dtype() -> None:
    with pytest.raises(NonFiniteError, match=r"cps step from sigma 0.5 to 0.0 .*torch.float32.*use rule 'ode'"):
        flow.step(one(1.0), one(2.0), 0.5, 0.0, 0.7, "cps")


@pytest.mark.parametrize("rule", ["ode", "sde", "cps", "dance"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_is_an_error_that_names_sigmas_and_dtype(rule: Rule, bad: float) -> None:
    level = 0.0 if rule == "ode" else 0.5
    with pytest.raises(NonFiniteError, match=r"velocity of the .* sigma 0.5 to 0.25 is not finite \(torch.bfloat16\)"):
        flow.step(one(1.0), one(bad, dtype=torch.bfloat16), 0.5, 0.25, level, rule)


@pytest.mark.parametrize(
    ("rule", "mean"),
    # ode: 1 - .002 * 300. Off that, with x1 = 299.8: sde .5e-4 x1 / .996 * .002, cps 1.2e-4 of .002 x1,
    # dance .5e-4 x1 / .004 * .002.
    [("ode", 0.4), ("sde", 0.39997), ("cps", 0.399926), ("dance", 0.392505)],
)
def test_half_precision_in_gives_finite_float32_out(rule: Rule, mean: float) -> None:
    # Near the image std is so small that its square, and 300^2, leave the range of float16.
    x, v = one(1.0, 4, torch.float16), one(300.0, 4, torch.float16)
    level = 0.0 if rule == "ode" else 0.01
    result = flow.step(x, v, 0.004, 0.002, level, rule, noise=one(1.0, 4, torch.float16))
    assert {t.dtype for t in result} == {torch.float32}
    assert all(bool(torch.isfinite(t).all()) for t in result)
    # Terms of size .6 cancel in float32.
    assert result.mean[0, 0].item() == pytest.approx(mean, abs=2e-6)


def test_noise_comes_from_the_global_generator_where_none_is_given() -> None:
    torch.manual_seed(7)
    expected = 0.18 + 0.4 * torch.randn(1, 5)
    torch.manual_seed(7)
    drawn = flow.step(one(1.0, 5), one(2.0, 5), 0.5, 0.25, 0.8, "sde").x_next
    assert torch.allclose(drawn, expected, atol=ROUNDED)


def test_the_mean_ratio_is_one_for_summed_log_probs_and_below_one_for_averaged_ones() -> None:
    n, d, std, move = 100_000, 4, 0.5, 0.15
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    old, new, deviation = torch.zeros(n, d), torch.full((n, d), move), torch.tensor([[std]])
    y = old + std * noise

    def ratios(reduction: flow.Reduction) -> Tensor:
        log_new, log_old = (flow.log_prob(y, mean, deviation, reduction=reduction) for mean in (new, old))
        return torch.exp(log_new - log_old).double()

    ratio = {"sum": ratios("sum"), "mean": ratios("mean")}
    # log-ratio ~ N(-c/2, c) with c = d (move / std)^2 = .36; a mean over d divides it by d.
    for reduction, expected in (("sum", 1.0), ("mean", math.exp(-0.36 / (2 * d) + 0.36 / (2 * d**2)))):
        error = float(ratio[reduction].std()) / math.sqrt(n)
        assert float(ratio[reduction].mean()) == pytest.approx(expected, abs=4 * error)  # four standard errors
    assert float(ratio["mean"].mean()) < 0.98


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_flux_shifts_by_the_exponential_of_a_line_through_its_tokens(tokens: int, mu: float) -> None:
    # 0.65 / 3840 for each token: a fifth of the way at 1024.
    assert flow.dynamic_shift(tokens) == pytest.approx(math.exp(mu))
    assert flow.dynamic_shift(tokens, exponential=False) == pytest.approx(mu)


def test_the_shifted_schedule_has_the_published_values_for_flux_at_512_pixels() -> None:
    shifted = flow.sigmas(6, shift=flow.dynamic_shift(1024))
    # Four decimals are published.
    assert shifted.tolist() == pytest.approx([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0], abs=6e-5)


def test_the_plain_schedule_is_linear_from_one_to_zero() -> None:
    assert flow.sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_an_unknown_rule_or_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown step rule 'heun'"):
        flow.moments(one(1.0), one(1.0), 0.5, 0.25, 0.5, "heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'max'"):
        flow.reduce_latent(torch.ones(1, 2), "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["sde", "cps", "dance", "memoryless"])
@pytest.mark.parametrize("dimensions", [4 * 8 * 8, 16 * 64 * 64], ids=["tiny SD3", "FLUX at 512 pixels"])
@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_log_ratio_of_near_policies_is_that_of_float64_at_any_size(
    rule: Rule, dimensions: int, apart: float, reduction: flow.Reduction
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, old, noise, change = torch.randn(4, 4, dimensions, generator=generator)
    new = old + apart * change  # float32: what follows is about these very numbers
    _, std = flow.moments(x, old, 0.8, 0.6, 0.7, rule)
    shift, _ = flow.moments(torch.zeros_like(x), new - old, 0.8, 0.6, 0.7, rule)
    got = flow.log_ratio(shift, noise, std, reduction=reduction)

    # Means by the rule's definition in float64: d mean / d v from two velocities that are far apart.
    slope = (flow.moments(x, old + 1, 0.8, 0.6, 0.7, rule)[0] - flow.moments(x, old, 0.8, 0.6, 0.7, rule)[0]).double().mean()
    moved, deviation = slope * (new.double() - old.double()), std.double()
    exact = ((noise * deviation) ** 2 - (noise * deviation - moved) ** 2) / (2 * deviation**2)
    want = exact.sum(1) if reduction == "sum" else exact.mean(1)
    assert got.dtype == torch.float32
    # Terms of both signs nearly cancel: rounding is counted against their deviation over the dimensions.
    terms_of_both_signs = exact.std(1) * dimensions**0.5 / (1 if reduction == "sum" else dimensions)
    assert ((got - want).abs() / terms_of_both_signs).max() < 1e-4  # float32, and the slope's own rounding


def test_the_difference_of_two_sums_of_log_densities_is_noise_at_the_size_of_flux() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, noise, change = torch.randn(3, 4, 16 * 64 * 64, generator=generator)
    std = torch.tensor(0.1)
    x, moved = mean + std * noise, 1e-6 * change
    want = (moved.double() / std * noise).sum(1)
    subtracted = flow.log_prob(x, mean + moved, std, reduction="sum") - flow.log_prob(x, mean, std, reduction="sum")
    assert ((subtracted - want).abs() / want.abs()).median() > 0.5
    assert torch.allclose(flow.log_ratio(moved, noise, std, reduction="sum").double(), want, rtol=1e-3, atol=1e-5)
