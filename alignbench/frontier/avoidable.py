"""What a method lost needlessly: the front's metric at the method's reward, minus the method's own."""

from typing import NamedTuple

import numpy as np

from alignbench.frontier.front import KL, REWARD, Front
from alignbench.statistics import CONFIDENCE, Interval

RESAMPLES = 2000
UNREACHED = 0.05
"""Share of resamples in which the front does not reach the method's reward, above which there is no interval."""


class AvoidableLoss(NamedTuple):
    """A method against the front at its own reward; intervals are over prompts, for this trained model.

    Attributes:
        front: the metric of the tilted target that has the method's reward.
        loss: that minus the method's metric; above 0, the method lost more than the reward asks for. Where lower is better or
            neither direction is, it is a plain difference.
        beta: the tilt with that reward.
        kl: the KL divergence of that target to the base model, in nats.
    """

    front: Interval
    loss: Interval
    beta: float
    kl: float


def avoidable_loss(front: Front, metric: str, rewards: np.ndarray, values: np.ndarray, *, seed: int = 0) -> AvoidableLoss:
    """Compares a method with the front at equal reward.

    Prompts are resampled, the same for method and front; each resample has its own reward and its own place on the front.

    Args:
        metric: one of the front's metrics.
        rewards: the method's mean reward of each evaluation prompt, float [P].
        values: its metric of each prompt, float [P]; NaN where the prompt has none.

    Returns:
        NaN throughout where the reward is above what the front's samples reach. A reward below the base model's is compared
        with the base model, which has that reward at no cost.
    """
    reward_curve, metric_curve, kl_curve = front.values(REWARD), front.values(metric), front.values(KL)
    betas = np.array(front.strengths())
    usable = ~np.isnan(values) & ~np.isnan(metric_curve).any(0) & ~np.isnan(rewards) & ~np.isnan(reward_curve).any(0)
    count = int(usable.sum())
    nothing = Interval(np.nan, np.nan, np.nan, count)
    if count == 0:
        return AvoidableLoss(nothing, nothing, np.nan, np.nan)
    reward_curve, metric_curve, kl_curve = (curve[:, usable] for curve in (reward_curve, metric_curve, kl_curve))
    rewards, values = rewards[usable], values[usable]
    at_front = float(_on_front(reward_curve, metric_curve, rewards, np.arange(count)[None])[0])
    if np.isnan(at_front):
        return AvoidableLoss(nothing, nothing, np.nan, np.nan)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    fronts = _on_front(reward_curve, metric_curve, rewards, draws)
    losses = fronts - values[draws].mean(1)
    mean_rewards, own = np.maximum.accumulate(reward_curve.mean(1)), float(rewards.mean())
    return AvoidableLoss(
        _percentiles(at_front, fronts, count),
        _percentiles(at_front - float(values.mean()), losses, count),
        float(np.interp(own, mean_rewards, betas)),
        float(np.interp(own, mean_rewards, kl_curve.mean(1))),
    )


def loss_at_reward(front: Front, metric: str, rewards: np.ndarray, values: np.ndarray) -> float:
    """The value of `avoidable_loss` alone: the front's metric at the method's mean reward minus the method's."""
    apart = metric_at_reward(front, metric, np.where(np.isnan(values), np.nan, rewards)) - values
    return float(apart[~np.isnan(apart)].mean()) if not np.isnan(apart).all() else float("nan")


def metric_at_reward(front: Front, metric: str, rewards: np.ndarray) -> np.ndarray:
    """The metric of each prompt, float [P], under the tilt whose mean reward is the method's; NaN beyond the front.

    Args:
        rewards: the method's mean reward of each prompt, float [P].
    """
    usable = ~np.isnan(rewards)
    reached = np.maximum.accumulate(front.values(REWARD)[:, usable].mean(1))
    own = float(rewards[usable].mean()) if usable.any() else np.nan
    place = np.interp(own, reached, np.arange(len(reached)), right=np.nan)
    curve = front.values(metric)
    if np.isnan(place):
        return np.full(curve.shape[1], np.nan)
    below = int(place)
    above = min(below + 1, len(reached) - 1)
    return np.asarray(curve[below] + (place - below) * (curve[above] - curve[below]))


def reward_at_kl(front: Front, kl: float) -> float:
    """The front's mean reward at a KL divergence to the base model in nats; NaN beyond the front."""
    kls = np.maximum.accumulate(front.values(KL).mean(1))
    return float(np.interp(kl, kls, np.maximum.accumulate(front.values(REWARD).mean(1)), right=np.nan))


def _on_front(reward_curve: np.ndarray, metric_curve: np.ndarray, rewards: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The front's metric at the mean reward of each draw of prompts, float [B].

    Args:
        reward_curve, metric_curve: float [S, P], by ascending strength.
        rewards: the method's, float [P].
        draws: indices of prompts, int [B, P].
    """
    found = np.empty(len(draws))
    for b, chosen in enumerate(draws):
        # A tilt's reward rises with beta; estimates of it need not, by the last digits.
        ladder = np.maximum.accumulate(reward_curve[:, chosen].mean(1))
        found[b] = np.interp(rewards[chosen].mean(), ladder, metric_curve[:, chosen].mean(1), right=np.nan)
    return found


def _percentiles(value: float, resampled: np.ndarray, count: int) -> Interval:
    """Percentile interval of the bootstrap; unbounded where too many resamples have no value, or one prompt counts alone."""
    missing = float(np.isnan(resampled).mean())
    if missing > UNREACHED or count < 2:
        return Interval(value, -np.inf, np.inf, count)
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.nanpercentile(resampled, [tail, 100 - tail])
    return Interval(value, float(lower), float(upper), count)
