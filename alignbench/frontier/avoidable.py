"""Avoidable loss: the metric of the front at a method's reward, minus the metric of the method."""

from typing import NamedTuple

import numpy as np

from alignbench.frontier.front import KL, REWARD, Front
from alignbench.statistics import CONFIDENCE, Interval

RESAMPLES = 2000
"""Number of bootstrap resamples."""
UNREACHED = 0.05
"""Largest share of resamples in which the front may miss the method's reward; with more there is no interval."""


class AvoidableLoss(NamedTuple):
    """A method compared with the front at the method's reward; intervals are over prompts, for this trained model.

    Attributes:
        front: the metric of the tilted target that has the method's reward.
        loss: that metric minus the method's. If higher is better, a loss above 0 is more than the reward requires; otherwise
            it is a plain difference.
        beta: beta of that target.
        kl: the KL divergence of that target to the base model, in nats.
    """

    front: Interval
    loss: Interval
    beta: float
    kl: float


def avoidable_loss(front: Front, metric: str, rewards: np.ndarray, values: np.ndarray, *, seed: int = 0) -> AvoidableLoss:
    """Compares a method with the front at equal reward, with intervals by a bootstrap over prompts.

    Method and front are resampled together. Each resample has its own mean reward, and so its own point of the front.

    Args:
        front: the front.
        metric: one of the front's metrics.
        rewards: the method's mean reward on each evaluation prompt, float [P].
        values: the method's metric on each prompt, float [P]; NaN where a prompt has none.
        seed: seed of the bootstrap.

    Returns:
        The comparison. All its numbers are NaN if the reward is above what the front's samples reach. A reward below that of
        the base model is compared with the base model, which has that reward at no cost.
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
    resamples = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    fronts = _on_front(reward_curve, metric_curve, rewards, resamples)
    losses = fronts - values[resamples].mean(1)
    mean_rewards, own = np.maximum.accumulate(reward_curve.mean(1)), float(rewards.mean())
    return AvoidableLoss(
        _percentiles(at_front, fronts, count),
        _percentiles(at_front - float(values.mean()), losses, count),
        float(np.interp(own, mean_rewards, betas)),
        float(np.interp(own, mean_rewards, kl_curve.mean(1))),
    )


def loss_at_reward(front: Front, metric: str, rewards: np.ndarray, values: np.ndarray) -> float:
    """Computes only the value of `avoidable_loss`: the front's metric at the method's mean reward, minus the method's."""
    apart = metric_at_reward(front, metric, np.where(np.isnan(values), np.nan, rewards)) - values
    return float(apart[~np.isnan(apart)].mean()) if not np.isnan(apart).all() else float("nan")


def metric_at_reward(front: Front, metric: str, rewards: np.ndarray) -> np.ndarray:
    """Computes a metric of each prompt under the tilted target that has the method's mean reward.

    Args:
        front: the front.
        metric: one of the front's metrics.
        rewards: the method's mean reward on each prompt, float [P].

    Returns:
        float [P], NaN if the front does not reach that reward, and for prompts that have no reward or are not on the front.
    """
    reward_curve, curve = front.values(REWARD), front.values(metric)
    usable = ~np.isnan(rewards) & ~np.isnan(reward_curve).any(0) & ~np.isnan(curve).any(0)
    if not usable.any():
        return np.full(curve.shape[1], np.nan)
    reached = np.maximum.accumulate(reward_curve[:, usable].mean(1))
    place = np.interp(float(rewards[usable].mean()), reached, np.arange(len(reached)), right=np.nan)
    if np.isnan(place):
        return np.full(curve.shape[1], np.nan)
    curve = np.where(usable, curve, np.nan)
    below = int(place)
    above = min(below + 1, len(reached) - 1)
    return np.asarray(curve[below] + (place - below) * (curve[above] - curve[below]))


def reward_at_kl(front: Front, kl: float) -> float:
    """Computes the front's mean reward at a KL divergence to the base model, in nats; NaN if the front does not reach it."""
    kls, rewards = front.values(KL), front.values(REWARD)
    usable = ~np.isnan(kls).any(0) & ~np.isnan(rewards).any(0)
    kls, rewards = (np.maximum.accumulate(curve[:, usable].mean(1)) for curve in (kls, rewards))
    return float(np.interp(kl, kls, rewards, right=np.nan))


def _on_front(reward_curve: np.ndarray, metric_curve: np.ndarray, rewards: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """The front's metric at the method's mean reward, for each resample of prompts, float [B].

    Args:
        reward_curve, metric_curve: the front, float [S, P], by ascending strength.
        rewards: the method's reward on each prompt, float [P].
        resamples: indices of prompts, int [B, P].
    """
    values = np.empty(len(resamples))
    for b, chosen in enumerate(resamples):
        # The reward of a tilted target rises with beta; estimates of it may fall in the last digits.
        ascending = np.maximum.accumulate(reward_curve[:, chosen].mean(1))
        values[b] = np.interp(rewards[chosen].mean(), ascending, metric_curve[:, chosen].mean(1), right=np.nan)
    return values


def _percentiles(value: float, resampled: np.ndarray, count: int) -> Interval:
    """The percentile interval of a bootstrap; unbounded if too many resamples have no value, or if there is one prompt."""
    missing = float(np.isnan(resampled).mean())
    if missing > UNREACHED or count < 2:
        return Interval(value, -np.inf, np.inf, count)
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.nanpercentile(resampled, [tail, 100 - tail])
    return Interval(value, float(lower), float(upper), count)
