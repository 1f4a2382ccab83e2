"""What a comparison knows of the tuning that chose its settings, and the seeds that are kept for tuning."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from pydantic import Field

from alignbench.errors import UserError
from alignbench.settings import Settings
from alignbench.tasks import Task, load_task

FIRST_TUNING_SEED = 1_000_000
"""Seeds from here on belong to tuning. A comparison takes lower ones, so that it never repeats a run that chose a setting."""
TUNED_ON = ("training prompts", "validation prompts", "reward")
"""The parts of a task by which settings are tuned. Its test prompts and judges are not among them."""


class Tuned(Settings):
    """Where the settings of a comparison come from: the key `tuned` of a file that `tune` wrote."""

    task: str
    """The task on which they were tuned: its name, or the absolute path of its file."""
    backbone: str
    """The model on which they were tuned."""
    trials: int
    """Trials of each method."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of each trial."""
    select: str
    """The score by which the best trial was chosen."""
    task_hash: str
    """SHA-256 of the training prompts, the validation prompts and the reward of the task as they were."""
    trials_hash: str
    """SHA-256 of the settings and scores of all trials."""


def task_hash(task: Task) -> str:
    """SHA-256 of the parts of a task on which tuned settings depend."""
    fingerprint = task.fingerprint()
    return content_hash({part: fingerprint.get(part) for part in TUNED_ON})


def content_hash(data: object) -> str:
    """SHA-256 of data that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def refuse_elsewhere(tuned: Tuned, parts: Iterable[tuple[Sequence[str], str]]) -> None:
    """Refuses settings that were tuned for something else than is compared with them.

    Args:
        parts: the tasks and the backbone of each part of the comparison.

    Raises:
        UserError: a part has another task or backbone, or the task has changed since.
    """
    for tasks, backbone in parts:
        for kind, then, others in (("task", tuned.task, tasks), ("backbone", tuned.backbone, [backbone])):
            for now in others:
                if now != then:
                    raise UserError(
                        f"these settings were tuned for the {kind} {then} and not for {now}; compare on {then}, or run `tune` "
                        f"with --{kind} {now}"
                    )
    if task_hash(load_task(tuned.task)) != tuned.task_hash:
        raise UserError(
            f"the training prompts, validation prompts or reward of task {tuned.task} changed since these settings were tuned; "
            "put the task's files back as they were, or run `tune` again"
        )


def refuse_tuning_seeds(seeds: Iterable[int]) -> None:
    """Raises UserError where a comparison asks for seeds that belong to tuning."""
    for seed in seeds:
        if seed >= FIRST_TUNING_SEED:
            raise UserError(
                f"seeds from {FIRST_TUNING_SEED:,} on belong to `tune`, and a comparison must not repeat the runs that chose "
                f"its settings; take one below instead of {seed}"
            )
