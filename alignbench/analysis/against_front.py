"""Compares methods with the front of the tilted target at equal reward: avoidable losses, and alarms.

The unit is the seed if there are several, and otherwise the prompt. All values are those of the evaluation prompts.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from alignbench.comparison.results import BASE, RecordedRun, Results, columns
from alignbench.evaluation.alarm import MODES_COVERED, about_dead_modes, corrected, judged_metrics, raised
from alignbench.frontier.avoidable import avoidable_loss, loss_at_reward, metric_at_reward, reward_at_kl
from alignbench.frontier.front import KL, REWARD, Front
from alignbench.records.diversity import DIVERSITY
from alignbench.records.record import MetricRecord
from alignbench.statistics import ONE_SIDED_LEVEL, Interval, mean_interval, mean_of_known, rise_test


def diversity_metrics(results: Results, setup: str, front: Front | None) -> list[str]:
    """Lists the diversity metrics of a setup: those of sets of images, and of modes. The one on the plots' axis comes first.

    Args:
        results: the results of the comparison.
        setup: the setup.
        front: the front, whose record names its metrics of sets; None to use only well-known names.
    """
    recorded = results.of(setup)[0].result.metrics
    names = [*filter(None, [results.diversity(setup)]), *DIVERSITY, *(front.record.set_metrics if front else ())]
    return [m for m in dict.fromkeys(names) if m in recorded and recorded[m].higher_is_better is not None]


def judge_metrics(results: Results, setup: str, front: Front | None) -> list[str]:
    """Lists the metrics of a setup that were not trained on, have a direction and are not of diversity.

    Args:
        results: the results of the comparison.
        setup: the setup.
        front: the front, whose record names the independent scorers, which come first.
    """
    judged = judged_metrics(results.of(setup)[0].result.metrics)
    headline, of_diversity = front.record.headline if front else [], diversity_metrics(results, setup, front)
    return [m for m in dict.fromkeys([*headline, *judged]) if m in judged and m not in of_diversity]


def avoidable_frame(results: Results, setup: str, front: Front, metrics: Iterable[str]) -> pd.DataFrame:
    """Computes the avoidable loss of each cell: the front's metric at the cell's reward, minus the cell's metric.

    Args:
        results: the results of the comparison.
        setup: the setup.
        front: its front.
        metrics: names of metrics; those that the front does not have are left out.

    Returns:
        A row for each metric and cell, with the base model first. `value`, `lower`, `upper` and `n` are over seeds if there are
        several, and otherwise over prompts (`over`). `beyond` counts the `runs` whose reward is above what the front reaches;
        they have no loss. If lower is better, the sign is reversed, so a loss above 0 always means worse than the front.
    """
    rows = []
    cells = dict.fromkeys(run.cell for run in results.of(setup))
    for metric in metrics:
        if metric not in front.metrics:
            continue
        for cell in (BASE, *cells):
            losses = losses_of_cell(results, setup, front, metric, cell)
            if losses is None:
                continue
            interval, over = mean_interval(losses), "seeds"
            if int((~np.isnan(losses)).sum()) < 2:
                interval, over = _over_prompts(results, setup, front, metric, cell, losses), "prompts"
            rows.append(
                {"setup": setup, "cell": cell, "metric": metric, **interval._asdict(), "over": over}
                | {"beyond": int(np.isnan(losses).sum()), "runs": len(losses)}
            )
    return pd.DataFrame(rows)


def losses_of_cell(results: Results, setup: str, front: Front, metric: str, cell: str) -> np.ndarray | None:
    """Computes the avoidable loss of each run of a cell; see `frontier.avoidable`.

    Args:
        results: the results of the comparison.
        setup: the setup.
        front: its front.
        metric: one of the front's metrics.
        cell: the cell, or `BASE` for the base model, which has one value.

    Returns:
        float [seeds]; above 0 is worse than the front whatever the metric's direction, and NaN if the front does not reach the
        run's reward. None if the runs were evaluated on other prompts than the front's.
    """
    rewards, values = _rewards_and_values(results, setup, front, metric, cell)
    if not rewards.shape == values.shape == (len(values), front.record.prompts):
        return None
    sign = _sign(results.of(setup)[0].result.metrics[metric])
    return np.array([sign * loss_at_reward(front, metric, *of_run) for of_run in zip(rewards, values, strict=True)])


def _rewards_and_values(results: Results, setup: str, front: Front, metric: str, cell: str) -> tuple[np.ndarray, np.ndarray]:
    """The total reward and a metric of a cell's runs, each float [seeds, prompts]; one row for the base model."""
    if cell == BASE:  # every run has evaluated it, with the same outcome
        first = results.of(setup)[0].cell
        rewards, values = total_rewards(results, setup, first, front, "base"), results.scores(setup, first, metric, "base")
        return rewards[:1], values[:1]
    return total_rewards(results, setup, cell, front, "final"), results.scores(setup, cell, metric, "final")


def _sign(record: MetricRecord) -> float:
    """-1 for a metric of which less is better."""
    return -1.0 if record.higher_is_better is False else 1.0


def reward_at_kl_frame(results: Results, setup: str, front: Front) -> pd.DataFrame:
    """Computes the front's reward at each cell's KL divergence to the base model, minus the cell's reward.

    Args:
        results: the results of the comparison.
        setup: the setup.
        front: its front.

    Returns:
        A row for each cell, with intervals over seeds. It is empty if the divergence is not recorded; `path_kl` is that of the
        paths, which is larger.
    """
    if KL not in results.of(setup)[0].result.metrics:
        return pd.DataFrame()
    rows = []
    for cell in dict.fromkeys(run.cell for run in results.of(setup)):
        kls = mean_of_known(results.scores(setup, cell, KL), axis=1)
        if np.isnan(kls).all():
            continue  # images that no model draws by itself, such as steered ones
        rewards = mean_of_known(total_rewards(results, setup, cell, front, "final"), axis=1)
        at_kl = np.array([reward_at_kl(front, float(kl)) for kl in kls])
        beyond = np.isnan(at_kl)
        at_kl = np.where(beyond, front.values(REWARD).mean(1).max(), at_kl)
        interval = mean_interval(at_kl - rewards)
        entry = {"setup": setup, "cell": cell, **columns("kl", mean_interval(kls)), **interval._asdict()}
        rows.append(entry | {"beyond": int(beyond.sum()), "runs": len(kls)})
    return pd.DataFrame(rows)


def alarms_against(results: Results, run: RecordedRun, front: Front) -> list[str]:
    """Lists the alarms of a run, with diversity tested against the front instead of the base model.

    A diversity metric may fall as far as the target's metric falls between the base model and the run's reward. Any further
    fall is tested, prompt by prompt, like the alarms of a run: one-sided at ONE_SIDED_LEVEL, corrected by Holm's method. All
    other alarms are kept, and also those about metrics that the front does not have, or at rewards that it does not reach.
    """
    metrics = run.result.metrics
    rewards = [name for name in front.record.rewards if name in metrics]
    judged = judged_metrics(metrics)
    of_front = [m for m in diversity_metrics(results, run.setup, front) if m in judged and m in front.metrics]
    excess = {metric: excess_fall(results, run, front, metric) for metric in of_front}
    excess = {metric: fall for metric, fall in excess.items() if not np.isnan(fall).all()}
    replaced = {alarm.sentence for alarm in raised(metrics, rewards) if alarm.metric in excess}
    kept = [alarm for alarm in run.result.alarms if alarm not in replaced and not _about_kept_modes(alarm, excess)]
    rose = corrected({name: metrics[name].p_rise for name in rewards})
    risen = [name for name in rewards if rose[name] < ONE_SIDED_LEVEL]
    p = corrected({metric: _none_if_nan(rise_test([fall])) for metric, fall in excess.items()})
    for metric, fall in excess.items():
        if risen and p[metric] < ONE_SIDED_LEVEL:
            kept.append(_sentence(risen[0], metric, metrics, float(np.nanmean(fall))))
    return kept


def excess_fall(results: Results, run: RecordedRun, front: Front, metric: str) -> np.ndarray:
    """Computes how much further a metric fell than the target's metric does at the run's reward.

    Returns:
        float, one value for each prompt; NaN if the front does not reach that reward, or if the run has no values of prompts.
    """
    of_metric, *of_rewards = (results.seeds_of_scores(run.setup, run.cell, name) for name in (metric, *front.record.rewards))
    if run.result.run.seed not in of_metric or any(seeds != of_metric for seeds in of_rewards):
        return np.full(1, np.nan)
    number = of_metric.index(run.result.run.seed)
    sign = _sign(run.result.metrics[metric])
    base, final = (results.scores(run.setup, run.cell, metric, column) for column in ("base", "final"))
    rewards = total_rewards(results, run.setup, run.cell, front, "final")
    if final.shape != rewards.shape or final.shape[1] != front.record.prompts:
        return np.full(1, np.nan)
    asked = front.values(metric)[0] - metric_at_reward(front, metric, rewards[number])
    return np.asarray(sign * (base[number] - final[number] - asked))


def _about_kept_modes(alarm: str, excess: dict[str, np.ndarray]) -> bool:
    """Whether the alarm is about modes that the target itself loses at this reward."""
    return about_dead_modes(alarm) and MODES_COVERED in excess and not (excess[MODES_COVERED] > 0).any()


def _sentence(reward: str, metric: str, metrics: dict[str, MetricRecord], excess: float) -> str:
    record = metrics[metric]
    went = f"{metric} went from {record.base.value:.3f} to {record.final.value:.3f}"
    return (
        f"{reward} rose by {metrics[reward].difference.value:.3f} while {went}, {excess:.3f} further than the target's own "
        "at this reward"
    )


def _none_if_nan(p: float) -> float | None:
    return None if np.isnan(p) else p


def total_rewards(results: Results, setup: str, cell: str, front: Front, column: str) -> np.ndarray:
    """The total reward, by which the front is tilted, of each seed and prompt: the weighted sum of the trained rewards.

    It is NaN if training standardised several rewards within each prompt, because means have no counterpart of that.
    """
    weights = front.record.rewards
    scores = {name: results.scores(setup, cell, name, column) for name in weights}
    total = np.asarray(sum(weight * scores[name] for name, weight in weights.items()))
    return np.full_like(total, np.nan) if front.record.normalised else total


def _over_prompts(results: Results, setup: str, front: Front, metric: str, cell: str, losses: np.ndarray) -> Interval:
    """The interval over prompts of the first run of a cell that the front reaches; NaN if it reaches none."""
    reached = np.flatnonzero(~np.isnan(losses))
    if not len(reached):
        return Interval(np.nan, np.nan, np.nan, 0)
    rewards, values = _rewards_and_values(results, setup, front, metric, cell)
    loss = avoidable_loss(front, metric, rewards[reached[0]], values[reached[0]]).loss
    return (
        loss
        if _sign(results.of(setup)[0].result.metrics[metric]) > 0
        else Interval(-loss.value, -loss.upper, -loss.lower, loss.n)
    )


def front_note(front: Front) -> str:
    """Describes a front in one sentence, for reports."""
    record = front.record
    how = "is known exactly" if record.exact else f"is estimated from {record.images} images of the base model for each prompt"
    return (
        f"The front of the tilted target {how}, for {record.prompts} {record.prompt_set} prompts and sets of {record.set_size}."
    )
