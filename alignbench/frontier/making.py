"""Makes the front of a configuration, or reads it if a front with the same content has already been made."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.figures.style import write_figure
from alignbench.files.writing import exclusive
from alignbench.frontier import BEST_OF, IMAGES
from alignbench.frontier.estimated import measure_front
from alignbench.frontier.exact import knows_target, measure_known_front
from alignbench.frontier.figure import draw_front
from alignbench.frontier.front import (
    EVALUATION,
    Front,
    PromptSet,
    content_key,
    dependence,
    read_front,
    write_front,
)
from alignbench.load import load_configured_backbone
from alignbench.registry import file_name
from alignbench.tasks import configured_task

KEY_LETTERS = 10
"""Number of letters of a front's key in the name of its folder."""


def front_of(
    config: RunConfig,
    out: Path,
    *,
    images: int = IMAGES,
    betas: Sequence[float] | None = None,
    best_of: Sequence[int] = BEST_OF,
    kind: str = EVALUATION,
    advance: Callable[[str], None] = lambda what: None,
) -> tuple[Front, Path]:
    """Makes or reads the front of a run's task, backbone and evaluation.

    Args:
        config: the configuration of the run.
        out: the parent folder of fronts. Each front has a folder of its own, which is named by task, backbone and content.
        images, betas, best_of: as for `measure_front`. If the backbone knows its target, samples of the target replace
            reweighted ones, and `images` is not used.
        kind: whether the front is for a run's evaluation, or for its curve on validation prompts.
        advance: called with what is being done, for a progress display.

    Returns:
        The front and its folder.

    Raises:
        UserError: the configuration is wrong or has a `scorer_url`, or a front in the folder is damaged.
        RunError: a scorer failed.
        DiskError: the disk is full.
    """
    if config.scorer_url:
        raise UserError("`front` does not ask the scorer at scorer_url; leave it out for the front of the task's own reward")
    task = configured_task(config)
    prompt_set = PromptSet.of(task, config.evaluation, kind)
    suite = MetricSuite(task, config.scorer_timeout)
    advance("loading models")
    suite.prepare()
    suite.check_prompts(prompt_set.prompts)
    policy = load_configured_backbone(config)
    exact = knows_target(policy, prompt_set.prompts, suite)
    asked: dict[str, Any] = {"images": images, "betas": betas, "best_of": list(best_of), "normalise": config.normalise_rewards}
    asked |= {"kind": kind, "exact": exact}
    key = content_key(policy, task, suite, config.evaluation, **asked)
    name = Path(config.backbone.name).name
    folder = out / f"{file_name(task.name)}-{file_name(name)}-{key[:KEY_LETTERS]}"
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder, patience=float("inf")):
        existing = read_front(folder)
        if existing is not None and existing.record.key == key:
            return existing, folder
        shared = (policy, task, suite, config.evaluation)
        options: dict[str, Any] = {"backbone": name, "betas": betas, "best_of": best_of, "prompt_set": prompt_set}
        if exact:
            front = measure_known_front(*shared, **options, advance=advance)
        else:
            options |= {"images": images, "normalise_rewards": config.normalise_rewards, "micro_batch": config.micro_batch}
            front = measure_front(*shared, **options, advance=advance)
        depends_on = dependence(config.anchored().resolved())
        keyed = Front(front.record.model_copy(update={"key": key, "config": depends_on}), front.table)
        write_front(keyed, folder)
        write_figure(folder / "front.png", draw_front(keyed))
    return keyed, folder
