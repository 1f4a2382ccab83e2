"""Evaluates a policy: the same prompts and the same initial noise for every model that is compared."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from alignbench import groups
from alignbench.backbone import Backbone, KnownDistributions, Measured, PointDistribution
from alignbench.config.run_config import EvaluationConfig
from alignbench.errors import RunError, ScorerError, UserError
from alignbench.files.images import ImageFiles
from alignbench.inference.drawing import PLAIN, Drawing, ImageCost
from alignbench.inference.reward import Reward
from alignbench.load import load_eval
from alignbench.records.record import Estimate, MetricRecord
from alignbench.rollouts.executor import decode, predict, rollout
from alignbench.rollouts.noise import group_keys
from alignbench.rollouts.plan import Plan, Step
from alignbench.rollouts.terms import EdgeRows, edge_terms
from alignbench.runtime import hub
from alignbench.runtime.processes import SINGLE_PROCESS, Processes
from alignbench.runtime.signals import TimeLimitError, time_limit
from alignbench.scorer import (
    Images,
    Metric,
    Scorer,
    SetMetric,
    as_arrays,
    checked_scores,
    frames_in,
    measure_set,
    of_frames,
)
from alignbench.statistics import difference, mean_of_means_interval, rise_test
from alignbench.tasks import EvalChoice, Task

COLUMNS = ["prompt_index", "prompt", "image", "metric", "value"]
PATH_STEPS, PATH_NOISE, PATHS = 8, 0.7, 64
"""Settings of `path_kl`: denoising steps, their eta, and the number of rollouts over all prompts, at least one of each."""
DEFAULT_VALIDATION_PROMPTS = 12
"""The number of validation prompts where `evaluation.validation_prompts` is null; all that the task has if these are fewer."""


@contextmanager
def named_failure(name: str, when: str, seconds: float | None = None) -> Iterator[None]:
    """Turns any exception of an eval inside the block into a ScorerError that names the eval; a UserError is passed on.

    Args:
        name: the eval.
        when: what was being done, for the message.
        seconds: how long the block may take; None for any time.
    """
    try:
        with time_limit(seconds):
            yield
    except UserError:
        raise
    except TimeLimitError:
        late = f"scorer {name!r} did not answer within {seconds:g} s {when}"
        raise ScorerError(f"{late}; if it only needs longer, raise scorer_timeout") from None
    except RunError as error:
        raise ScorerError(str(error)) from error
    except Exception as error:
        raise ScorerError(f"scorer {name!r} failed {when}: {type(error).__name__}: {error}") from error


class MetricSuite:
    """A task's reward scorers and judges, loaded once.

    Attributes:
        rewards: the scorers that score every rollout, by name.
        weights: the weight of each reward that is trained on; the others have weight 0 and only inform the objective.
        evals: the rewards, and the judges, which only evaluate.
        timeout: how many seconds one of them may take for one call; None for any time.
    """

    def __init__(self, task: Task, timeout: float | None = None) -> None:
        self.timeout = timeout
        self.rewards: dict[str, Scorer] = {}
        self.weights = task.weights
        self.evals: dict[str, Metric] = {}
        task.require_weight()
        for choice in task.config.reward:
            scorer = self._load(choice)
            if not isinstance(scorer, Scorer):
                raise UserError(
                    f"task {task.name!r}: {choice.eval!r} measures sets of images and cannot be a reward; list it under judges"
                )
            self.rewards[scorer.name] = scorer
        for judge in task.config.judges:
            self._load(judge)

    def _load(self, choice: EvalChoice) -> Metric:
        found = load_eval(choice.eval, **choice.settings)
        found.name = choice.title
        if found.name in self.evals:
            raise UserError(f"two evals go by the name {found.name!r}; give one of them another label")
        self.evals[found.name] = found
        return found

    def only(self, kind: type[Metric]) -> "MetricSuite":
        """A suite with only the evals of one kind, such as `Scorer`; nothing is loaded again."""
        part = copy.copy(self)
        part.evals = {name: metric for name, metric in self.evals.items() if isinstance(metric, kind)}
        return part

    def require(self) -> None:
        """Raises UserError if weights are missing that the hub does not provide, before anything is loaded."""
        hub.require({weights: name for name, found in self.evals.items() for weights in found.from_hub()})

    def prepare(self) -> None:
        """Loads the models of all evals.

        Raises:
            UserError: weights are missing.
            RunError: an eval fails.
        """
        self.require()
        for found in self.evals.values():
            found.prepare()

    def check_prompts(self, evaluated: Sequence[str], trained: Sequence[str] = ()) -> None:
        """Raises UserError for a prompt that an eval would refuse to score; prompts of the training are for rewards alone."""
        for name, found in self.evals.items():
            with named_failure(name, "on looking at the prompts", self.timeout):
                found.check_prompts([*evaluated, *(trained if name in self.rewards else ())])

    def score(self, images: np.ndarray, prompts: Sequence[str], *, when: str) -> dict[str, np.ndarray]:
        """Scores images with every reward.

        Args:
            images: uint8 [N, H, W, 3], or clips [N, F, H, W, 3].
            prompts: the prompt of each image.
            when: what is being done, for the message of an error.

        Returns:
            Reward -> float64 [N], finite or NaN.

        Raises:
            ScorerError: a scorer failed or broke its contract; the sentence says which one, and `when`.
        """
        scores = {}
        for name, scorer in self.rewards.items():
            with named_failure(name, when, self.timeout):
                answered = of_frames(scorer.score, images, prompts)
                scores[name] = checked_scores(answered, len(images), name, frames_in(images))
        return scores

    def reward(self, *, normalise: bool) -> Reward:
        """The trained reward, for methods of inference that read it; `normalise` is the run's `normalise_rewards`."""
        score = partial(self.score, when="while images were chosen")
        return Reward(score, self.weights, calls=len(self.rewards), normalise=normalise)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Describes every eval: its name -> what must be known to repeat its scores."""
        return {name: found.describe() for name, found in self.evals.items()}


@dataclass(frozen=True)
class Evaluation:
    """One model's images and scores.

    Attributes:
        table: a row for each image and metric: prompt_index, prompt, image (-1 for metrics of a whole prompt), metric, value.
        images: uint8 [N, H, W, 3], prompt by prompt, or clips [N, F, H, W, 3]; an array of objects [N] where images made
            elsewhere differ in size.
        prompts: the evaluation prompts.
        directions: metric -> whether higher is better, None where neither is.
        roles: metric -> `reward`, `judge`, or `part` of another metric.
        overall: metric -> the metrics whose mean it is; it has no rows of its own.
        distribution: what the model draws for the first prompt, where the backbone knows it.
        cost: what it took to draw one image; None for images made elsewhere.
    """

    table: pd.DataFrame
    images: np.ndarray
    prompts: list[str]
    directions: dict[str, bool | None]
    roles: dict[str, str]
    overall: dict[str, tuple[str, ...]] = field(default_factory=dict)
    distribution: PointDistribution | None = None
    cost: ImageCost | None = None


def joined_phases(**phases: Evaluation) -> pd.DataFrame:
    """The scores of several evaluations in one table, with the column `phase`."""
    return pd.concat([evaluation.table.assign(phase=phase) for phase, evaluation in phases.items()], ignore_index=True)


def evaluation_prompts(task: Task, config: EvaluationConfig) -> list[str]:
    """The prompts on which a model is evaluated.

    Raises:
        UserError: more are asked for than the task has; training prompts are never used instead.
    """
    if config.prompts > len(task.eval_prompts):
        raise UserError(
            f"evaluation.prompts={config.prompts} but task {task.name!r} has {len(task.eval_prompts)} evaluation prompts; "
            "lower it (training prompts are never used for evaluation)"
        )
    return task.eval_prompts[: config.prompts]


def validation_prompts(task: Task, config: EvaluationConfig) -> list[str]:
    """The prompts on which a run is evaluated along its training; none where the task has none.

    Raises:
        UserError: more are asked for than the task has.
    """
    available = task.validation_prompts
    wanted = config.validation_prompts
    if wanted is not None and available and wanted > len(available):
        raise UserError(
            f"evaluation.validation_prompts={wanted} but task {task.name!r} has {len(available)} validation prompts; lower it"
        )
    return available[: DEFAULT_VALIDATION_PROMPTS if wanted is None else wanted]


def evaluate(
    policy: Backbone,
    task: Task,
    suite: MetricSuite,
    config: EvaluationConfig,
    *,
    prompts: Sequence[str] | None = None,
    images_per_prompt: int | None = None,
    micro_batch: int | None = None,
    drawing: Drawing = PLAIN,
    advance: Callable[[str], None] = lambda what: None,
    processes: Processes = SINGLE_PROCESS,
) -> Evaluation:
    """Draws images of the task's evaluation prompts and evaluates them with every metric.

    Args:
        policy: the model.
        task: the task.
        suite: the metrics.
        config: the protocol.
        prompts, images_per_prompt: replace the task's evaluation prompts and the configured number of images of each.
        micro_batch: the largest number of rows in a model call; None for all rows.
        drawing: the method by which images are drawn.
        advance: called with what is being done, for a progress display.
        processes: the ranks that share the work; each of them returns the whole evaluation.

    Raises:
        UserError: more prompts are asked for than the task has, or a metric needs more images of a prompt.
        RunError: a scorer failed, or answered one constant for all images.
    """
    prompts = evaluation_prompts(task, config) if prompts is None else list(prompts)
    n = images_per_prompt or config.images_per_prompt
    for name, loaded in suite.evals.items():
        if isinstance(loaded, SetMetric) and n < loaded.fewest:
            least = loaded.fewest
            raise UserError(f"{name} needs {least} images of a prompt, but evaluation.images_per_prompt is {n}")
    advance("drawing images")
    policy.prepare(prompts)
    own = processes.share(range(len(prompts)))
    keys = group_keys(prompts)
    steps = config.steps or policy.default_steps

    def draw(model: Backbone) -> tuple[np.ndarray, Tensor]:
        latents = drawing.latents(
            model,
            [prompts[p] for p in own],
            [keys[p] for p in own],
            n,
            steps=steps,
            seed=config.seed,
            solver=config.solver,
            micro_batch=micro_batch,
        )
        return decode(policy, latents, micro_batch), latents

    with drawing.model(policy) as model:
        images, latents = processes.on_all_ranks(lambda: draw(model), calls_model=True)
        known = _known_distributions(model, prompts, drawing)
    owners = [p for p in own[: processes.unpadded_length(prompts)] for _ in range(n)]
    here = slice(len(owners))
    own_part = processes.on_all_ranks(
        lambda: evaluate_images(images[here], latents[here], prompts, owners, suite, advance=advance)
    )
    found = replace(_gathered(own_part, processes), cost=drawing.cost(steps, config.solver))
    return found if known is None else _with_known_distributions(found, *known)


Known = tuple[dict[str, Measured], PointDistribution | None]
"""The metrics that a model computes itself, and its distribution for the first prompt."""


def _known_distributions(model: Backbone, prompts: Sequence[str], drawing: Drawing) -> Known | None:
    """What a model knows of its images; None where it, or the method of drawing, has no known distribution."""
    if not isinstance(model, KnownDistributions) or not drawing.has_model:
        return None
    best_of = drawing.candidates
    return model.measure(prompts, best_of), model.distribution(prompts[0], best_of)


def _with_known_distributions(
    evaluation: Evaluation, metrics: Mapping[str, Measured], distribution: PointDistribution | None
) -> Evaluation:
    prompts, rows = evaluation.prompts, []
    for metric, measured in metrics.items():
        evaluation.directions[metric], evaluation.roles[metric] = measured.higher_is_better, "judge"
        rows += [(p, prompts[p], -1, metric, float(value)) for p, value in enumerate(measured.values)]
    table = pd.concat([evaluation.table, pd.DataFrame(rows, columns=COLUMNS)])
    return replace(evaluation, table=table, distribution=distribution)


def evaluate_images(
    images: Images | ImageFiles,
    latents: Tensor | None,
    prompts: Sequence[str],
    owners: Sequence[int],
    suite: MetricSuite,
    *,
    advance: Callable[[str], None] = lambda what: None,
) -> Evaluation:
    """Evaluates images, wherever they come from.

    Args:
        images: uint8 [N, H, W, 3], clips [N, F, H, W, 3], or PIL images; or files, which are read part by part and not kept.
        latents: final latents [N, *latent]; None for images made elsewhere.
        prompts: the prompts.
        owners: the index into `prompts` of each image; prompts without an image are left out.
        suite: the metrics.
        advance: called with what is being done, for a progress display.

    Raises:
        RunError: a scorer failed.
    """
    of_prompt = [[i for i, owner in enumerate(owners) if owner == p] for p in range(len(prompts))]
    source = images if isinstance(images, np.ndarray | ImageFiles) else _stacked(as_arrays(images))
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in suite.evals}
    scorers = {name: found for name, found in suite.evals.items() if isinstance(found, Scorer)}
    metrics = {name: found for name, found in suite.evals.items() if isinstance(found, SetMetric)}
    if owners and scorers:
        for part, arrays in _parts(source):
            so_far = f" ({part[0]} of {len(owners)} images are done)" if len(part) < len(owners) else ""
            some = arrays if arrays.dtype == np.uint8 else list(arrays)
            for name, scorer in scorers.items():
                advance(f"evaluating {name}{so_far}")
                with named_failure(name, "in the evaluation", suite.timeout):
                    asked = [prompts[owners[i]] for i in part]
                    answered = of_frames(scorer.measure, some, asked)
                    if name in suite.rewards and name not in answered:
                        answered = {name: of_frames(scorer.score, some, asked), **answered}
                    for metric, values in answered.items():
                        of_all = scores[name].setdefault(metric, np.full(len(owners), np.nan))
                        of_all[part] = checked_scores(values, len(part), metric, frames_in(arrays))
    for p in sorted({*owners}) if metrics else ():
        mine = of_prompt[p]
        arrays = _some(source, mine)
        for name, measured in metrics.items():
            if len(mine) < measured.fewest or (arrays.dtype == object and not measured.any_sizes):
                continue
            advance(f"evaluating {name}")
            own_latents = None if latents is None else latents[mine].cpu()
            with named_failure(name, "in the evaluation", suite.timeout):
                for metric, value in measure_set(measured, arrays, own_latents, prompts[p]).items():
                    of_all = scores[name].setdefault(metric, np.full(len(prompts), np.nan))
                    of_all[p] = checked_scores([value], 1, metric)[0]
    kept = np.empty(0, np.uint8) if isinstance(source, ImageFiles) else source
    return _as_evaluation(scores, kept, prompts, owners, of_prompt, suite)


def _as_evaluation(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    images: np.ndarray,
    prompts: Sequence[str],
    owners: Sequence[int],
    of_prompt: Sequence[Sequence[int]],
    suite: MetricSuite,
) -> Evaluation:
    """The scores as an evaluation.

    Args:
        scores: eval -> metric -> a value for each image, or for each prompt of a set metric; NaN where there is none.
    """
    number = {i: k for mine in of_prompt for k, i in enumerate(mine)}
    rows: list[tuple[int, str, int, str, float]] = []
    directions: dict[str, bool | None] = {}
    roles: dict[str, str] = {}
    overall: dict[str, tuple[str, ...]] = {}
    for name, found in suite.evals.items() if owners else ():
        of_overall = found.overall(prompts)
        role = "reward" if name in suite.rewards else "judge"
        overall |= of_overall
        parts = {part for several in of_overall.values() for part in several}
        of_eval = scores[name]
        if not of_eval and isinstance(found, SetMetric):  # it could measure no prompt, which its own name shows
            of_eval = {name: np.full(len(prompts), np.nan)}
        for metric, values in of_eval.items():
            # A metric of an earlier eval keeps its name; a second one of that name gets its eval's behind it.
            column = f"{metric}_{name}" if metric in directions else metric
            directions[column], roles[column] = found.higher_is_better(metric), "part" if metric in parts else role
            if isinstance(found, Scorer):
                rows += [(p, prompts[p], number[i], column, float(values[i])) for i, p in enumerate(owners)]
            else:
                rows += [(p, prompts[p], -1, column, float(values[p])) for p in sorted(set(owners))]
        for metric in of_overall:
            directions[metric], roles[metric] = found.higher_is_better(metric), role
    return Evaluation(pd.DataFrame(rows, columns=COLUMNS), images, list(prompts), directions, roles, overall)


def _parts(images: np.ndarray | ImageFiles) -> Iterator[tuple[list[int], np.ndarray]]:
    """The indices and the images of each part: all at once, unless they are files."""
    if isinstance(images, ImageFiles):
        yield from ((part, images.load(part)) for part in images.parts())
    else:
        yield list(range(len(images))), images


def _some(images: np.ndarray | ImageFiles, indices: Sequence[int]) -> np.ndarray:
    """uint8 [N, H, W, 3], or an array of objects [N] where sizes differ."""
    if isinstance(images, ImageFiles):
        return images.load(indices)
    some = images[indices]
    return _stacked(list(some)) if some.dtype == object else some


def _gathered(part: Evaluation, processes: Processes) -> Evaluation:
    """The evaluation of all prompts, gathered from the ranks, each of which has evaluated some of them."""
    if processes.count == 1:
        return part
    gathered = processes.all_gather_object([part.table.to_numpy().tolist(), part.directions, part.roles, part.overall])
    rows, directions, roles, overall = zip(*gathered, strict=True)
    images = processes.all_gather(torch.from_numpy(part.images))
    return Evaluation(
        pd.DataFrame([row for of_rank in rows for row in of_rank], columns=COLUMNS),
        np.concatenate([of_rank.numpy() for of_rank in images]),
        part.prompts,
        {metric: direction for of_rank in directions for metric, direction in of_rank.items()},
        {metric: role for of_rank in roles for metric, role in of_rank.items()},
        {metric: tuple(parts) for metric, parts in overall[0].items()},
    )


@torch.no_grad()
def path_kl(
    policy: Backbone,
    prompts: Sequence[str],
    seed: int,
    *,
    paths: int = PATHS,
    micro_batch: int | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> np.ndarray:
    """Computes the KL divergence of the policy's denoising paths from the base model's for each prompt: nats, float64 [P].

    It is the sum over stochastic steps of |mu - mu_ref|^2 / (2 std^2), summed over latent dimensions, on fresh rollouts of the
    policy by rule sde. The last step is deterministic and left out. Values can be compared only at equal PATH_STEPS and
    PATH_NOISE.
    """
    plan = Plan((*[Step("sde", PATH_NOISE)] * (PATH_STEPS - 1), Step()), roots=max(1, paths // len(prompts)))
    keys, own = group_keys(prompts), processes.share(range(len(prompts)))

    def measure() -> Tensor:
        mine, of_mine = [prompts[p] for p in own], [keys[p] for p in own]
        forest = rollout(policy, mine, plan, seed, reduction="sum", micro_batch=micro_batch, keys=of_mine)
        rows = EdgeRows.of(forest)
        with policy.reference():
            reference = predict(policy, rows.x, rows.sigma, policy.encode(mine), rows.group, micro_batch)
        kl = edge_terms(rows, forest.row_velocity, reference)["kl"]
        return forest.path_sum(kl).double().mean(1)[: processes.unpadded_length(prompts)]

    return np.asarray(torch.cat(processes.all_gather(processes.on_all_ranks(measure, calls_model=True))).cpu())


def with_measured(evaluation: Evaluation, metric: str, values: np.ndarray) -> Evaluation:
    """The evaluation with one more metric of the model itself, neither direction of which is better; `values` [prompts]."""
    rows = [(p, evaluation.prompts[p], -1, metric, float(value)) for p, value in enumerate(values)]
    table = pd.concat([evaluation.table, pd.DataFrame(rows, columns=COLUMNS)])
    directions, roles = {**evaluation.directions, metric: None}, {**evaluation.roles, metric: "judge"}
    return replace(evaluation, table=table, directions=directions, roles=roles)


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """The images as one array, uint8 [N, H, W, 3], or an array of objects [N] where sizes differ."""
    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    objects = np.empty(len(images), dtype=object)
    for i, image in enumerate(images):
        objects[i] = image
    return objects


def check_scores_vary(suite: MetricSuite, evaluation: Evaluation) -> None:
    """Refuses a reward that is the same for all images: nothing could be learnt from it, and its scorer may be broken.

    Raises:
        RunError: naming the reward and its constant.
    """
    for name in suite.rewards:
        values = evaluation.table.loc[evaluation.table.metric == name, "value"].dropna()
        if len(values) == 0:
            raise RunError(
                f"reward {name!r} could not score a single image of the base model; look at those of `eval --out DIR`"
            )
        if len(values) > 1 and not bool(groups.varies(torch.tensor(values.to_numpy(), dtype=torch.float64))):
            raise RunError(
                f"reward {name!r} is {values.iloc[0]:g} for all {len(values)} images of the base model, so there is nothing to "
                "learn from; look at images of `alignbench eval --out DIR`: either they show nothing that it measures (random "
                "weights, too few steps, other prompts than the model can draw), or its scorer is broken"
            )


def too_faint(suite: MetricSuite, evaluation: Evaluation) -> list[str]:
    """A sentence for each trained reward whose images of one prompt differ too little to be standardised."""
    found = []
    for name in suite.weights:
        table = evaluation.table[evaluation.table.metric == name]
        deviation = table.groupby("prompt", sort=False)["value"].std(ddof=0).median()
        if 0 < deviation < groups.MIN_STD:
            found.append(
                f"reward {name!r} varies by {deviation:.1g} within a prompt; deviations below {groups.MIN_STD:g} are not "
                "scaled up to 1, so it will teach little: give it in larger units"
            )
    return found


def estimates(evaluation: Evaluation) -> dict[str, Estimate]:
    """Computes each metric's mean over prompts with its interval."""
    return _estimates(_prompt_means(evaluation.table), evaluation)


def metric_changes(base: Evaluation, final: Evaluation) -> dict[str, MetricRecord]:
    """Computes base, final and their difference for each metric; differences are paired by prompt."""
    before, after = _prompt_means(base.table).align(_prompt_means(final.table))
    change = pd.DataFrame(difference(after.to_numpy(), before.to_numpy()), index=after.index, columns=after.columns)
    found = [_estimates(frame, base) for frame in (before, after, change)]
    p_rise = {metric: rise_test(_strata(change, base, metric)) for metric in base.directions}
    return {
        metric: MetricRecord(
            base=found[0][metric],
            final=found[1][metric],
            difference=found[2][metric],
            higher_is_better=direction,
            role=base.roles[metric],
            p_rise=None if np.isnan(p_rise[metric]) else p_rise[metric],
        )
        for metric, direction in base.directions.items()
    }


def _estimates(by_prompt: pd.DataFrame, evaluation: Evaluation) -> dict[str, Estimate]:
    """From prompts x metrics; the mean of several metrics is taken over their means."""
    return {m: Estimate.of(mean_of_means_interval(_strata(by_prompt, evaluation, m))) for m in evaluation.directions}


def _strata(by_prompt: pd.DataFrame, evaluation: Evaluation, metric: str) -> list[np.ndarray]:
    """For each metric whose mean it is, an array with a value for each prompt."""
    return [by_prompt[part].to_numpy() for part in evaluation.overall.get(metric, (metric,))]


def _prompt_means(table: pd.DataFrame) -> pd.DataFrame:
    """Prompts x metrics; a prompt none of whose images could be scored is NaN."""
    return table.groupby(["prompt_index", "metric"])["value"].mean().unstack("metric")
