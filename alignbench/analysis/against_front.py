"""Methods against the front of the tilted target at equal reward: what they lost needlessly, and the alarms that follow.

The unit is the seed where there are several, else the prompt. All of it is on the evaluation prompts.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from alignbench.comparison.results import BASE, DIVERSITY, RecordedRun, Results, columns
from alignbench.evaluation.alarm import ALARM_LEVEL, corrected, judged_metrics, raised
from alignbench.frontier.avoidable import avoidable_loss, loss_at_reward, metric_at_reward, reward_at_kl
from alignbench.frontier.front import KL, REWARD, Front
from alignbench.records.record import MetricRecord
from alignbench.statistics import Interval, mean_interval, rise_test

MODES = "modes_covered"


def diversity_metrics(results: Results, setup: str, front: Front | None) -> list[str]:
    """The setup's metrics of diversity, the one of its axis first: those of sets of images, and of modes.

    Args:
        front: knows which metrics are of sets; without it the known names count.
    """
    recorded = results.of(setup)[0].result.metrics
    known = [*filter(None, [results.diversity(setup)]), *DIVERSITY, *(front.record.set_metrics if front else ())]
    return [m for m in dict.fromkeys(known) if m in recorded and recorded[m].higher_is_better is not None]


def avoidable_frame(results: Results, setup: str, front: Front, metrics: Iterable[str]) -> pd.DataFrame:
    """A row for each cell and metric, the base model first: what the front has at the cell's reward, minus what the cell has.

    `value`, `lower`, `upper`, `n`: over seeds if there are several (`over`), else over prompts; NaN where the cell's reward is
    above what the front reaches, in `beyond` of its `runs`. Where lower is better the sign is turned, so that above 0 always
    means that the cell is worse than the front.
    """
    rows = []
    recorded = results.of(setup)[0].result.metrics
    cells = list(dict.fromkeys(run.cell for run in results.of(setup)))
    for metric in metrics:
        if metric not in front.metrics:
            continue
        sign = -1.0 if recorded[metric].higher_is_better is False else 1.0
        for cell in (BASE, *cells):
            source, column = (cells[0], "base") if cell == BASE else (cell, "final")
            rewards = _rewards(results, setup, source, front, column)
            values = results.scores(setup, source, metric, column)
            if cell == BASE:
                rewards, values = rewards[:1], values[:1]
            if not rewards.shape == values.shape == (len(values), front.record.prompts):
                continue
            losses = np.array([sign * loss_at_reward(front, metric, *of_run) for of_run in zip(rewards, values, strict=True)])
            interval, over = mean_interval(losses), "seeds"
            if int((~np.isnan(losses)).sum()) < 2:
                interval, over = _over_prompts(front, metric, rewards, values, losses, sign), "prompts"
            rows.append(
                {"setup": setup, "cell": cell, "metric": metric, **interval._asdict(), "over": over}
                | {"beyond": int(np.isnan(losses).sum()), "runs": len(losses)}
            )
    return pd.DataFrame(rows)


def reward_at_kl_frame(results: Results, setup: str, front: Front) -> pd.DataFrame:
    """A row for each cell: the front's reward at the cell's KL divergence to the base model, minus the cell's, over seeds.

    It is empty where the divergence is not known; `path_kl` is that of the paths, which is larger.
    """
    if KL not in results.of(setup)[0].result.metrics:
        return pd.DataFrame()
    rows = []
    for cell in dict.fromkeys(run.cell for run in results.of(setup)):
        kls = results.scores(setup, cell, KL).mean(1)
        if np.isnan(kls).all():
            continue  # images that no model draws by itself, such as steered ones
        rewards = _rewards(results, setup, cell, front, "final").mean(1)
        at_kl = np.array([reward_at_kl(front, float(kl)) for kl in kls])
        beyond = np.isnan(at_kl)
        at_kl = np.where(beyond, front.values(REWARD).mean(1).max(), at_kl)
        interval = mean_interval(at_kl - rewards)
        entry = {"setup": setup, "cell": cell, **columns("kl", mean_interval(kls)), **interval._asdict()}
        rows.append(entry | {"beyond": int(beyond.sum()), "runs": len(kls)})
    return pd.DataFrame(rows)


def alarms_against(results: Results, run: RecordedRun, front: Front) -> list[str]:
    """The alarms of a run with those about diversity tested against the front in place of the base model.

    A metric of diversity may fall as far as the target's own falls between the base model and the run's reward. What fell
    further, prompt by prompt, is tested as the alarm of a run is: one-sided at ALARM_LEVEL, corrected by Holm's method. Other
    alarms stay what they are, and so do those about metrics that the front does not have or at rewards that it does not reach.
    """
    metrics = run.result.metrics
    rewards = [name for name, record in metrics.items() if record.role == "reward"]
    judged = judged_metrics(metrics)
    of_front = [m for m in diversity_metrics(results, run.setup, front) if m in judged and m in front.metrics]
    excess = {metric: excess_fall(results, run, front, metric) for metric in of_front}
    excess = {metric: fall for metric, fall in excess.items() if not np.isnan(fall).all()}
    replaced = {alarm.sentence for alarm in raised(metrics, rewards) if alarm.metric in excess}
    kept = [alarm for alarm in run.result.alarms if alarm not in replaced and not _about_kept_modes(alarm, excess)]
    rose = corrected({name: metrics[name].p_rise for name in rewards})
    risen = [name for name in rewards if rose[name] < ALARM_LEVEL]
    p = corrected({metric: _known(rise_test([fall])) for metric, fall in excess.items()})
    for metric, fall in excess.items():
        if risen and p[metric] < ALARM_LEVEL:
            kept.append(_sentence(risen[0], metric, metrics, float(np.nanmean(fall))))
    return kept


def excess_fall(results: Results, run: RecordedRun, front: Front, metric: str) -> np.ndarray:
    """How much further a metric fell than the target's own does at this reward, for each prompt; NaN beyond the front."""
    place = [r.result.run.seed for r in results.of(run.setup) if r.cell == run.cell]
    number = sorted(place).index(run.result.run.seed)
    sign = -1.0 if run.result.metrics[metric].higher_is_better is False else 1.0
    base, final = (results.scores(run.setup, run.cell, metric, column) for column in ("base", "final"))
    rewards = _rewards(results, run.setup, run.cell, front, "final")
    if final.shape != rewards.shape or final.shape[1] != front.record.prompts:
        return np.full(1, np.nan)
    asked = front.values(metric)[0] - metric_at_reward(front, metric, rewards[number])
    return np.asarray(sign * (base[number] - final[number] - asked))


def _about_kept_modes(alarm: str, excess: dict[str, np.ndarray]) -> bool:
    """Whether it is about modes that the target itself gives up at this reward."""
    return " modes died for the prompt " in alarm and MODES in excess and not (excess[MODES] > 0).any()


def _sentence(reward: str, metric: str, metrics: dict[str, MetricRecord], excess: float) -> str:
    record = metrics[metric]
    went = f"{metric} went from {record.base.value:.3f} to {record.final.value:.3f}"
    return (
        f"{reward} rose by {metrics[reward].difference.value:.3f} while {went}, {excess:.3f} further than the target's own "
        "at this reward"
    )


def _known(p: float) -> float | None:
    return None if np.isnan(p) else p


def _rewards(results: Results, setup: str, cell: str, front: Front, column: str) -> np.ndarray:
    """The reward that the front is tilted by, of each seed and prompt: the weighted sum of those that were trained on.

    Several rewards are standardised within each prompt in training, which has no counterpart in means: then it is NaN.
    """
    weights = front.record.rewards
    scores = {name: results.scores(setup, cell, name, column) for name in weights}
    total = np.asarray(sum(weight * scores[name] for name, weight in weights.items()))
    return np.full_like(total, np.nan) if front.record.normalised else total


def _over_prompts(
    front: Front, metric: str, rewards: np.ndarray, values: np.ndarray, losses: np.ndarray, sign: float
) -> Interval:
    """The interval of the one run that the front reaches; NaN where it reaches none."""
    reached = np.flatnonzero(~np.isnan(losses))
    if not len(reached):
        return Interval(np.nan, np.nan, np.nan, 0)
    loss = avoidable_loss(front, metric, rewards[reached[0]], values[reached[0]]).loss
    return loss if sign > 0 else Interval(-loss.value, -loss.upper, -loss.lower, loss.n)


def front_note(front: Front) -> str:
    """What a reader must know of a front that methods are measured against, in a sentence."""
    record = front.record
    how = "is known exactly" if record.exact else f"is estimated from {record.images} images of the base model for each prompt"
    return (
        f"The front of the tilted target {how}, for {record.prompts} {record.prompt_set} prompts and sets of {record.set_size}."
    )
