"""The noise schedule of a diffusers folder, from its scheduler's options. Only plain Euler steps of a flow are accepted."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignbench import UserError, flow
from alignbench.backbones.pipelines.components import SCHEDULER
from alignbench.backbones.pipelines.trust import read_json

PLACE = "scheduler/scheduler_config.json"
FOLLOWED = frozenset(
    {
        "shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift", "base_image_seq_len",
        "max_image_seq_len", "shift_terminal",
    }
)  # fmt: skip
"""Scheduler options that alignbench supports; any other option would change the steps."""
AS_DEFAULT = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}
"""Scheduler options that may only have this value."""
LINE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""Options of a shift that is linear in the number of tokens."""


@dataclass(frozen=True)
class Schedule:
    """The options of a folder's `FlowMatchEulerDiscreteScheduler` that change its sigmas."""

    options: Mapping[str, Any]

    @property
    def dynamic(self) -> bool:
        """Whether the shift depends on the number of tokens (`use_dynamic_shifting`)."""
        return bool(self.options["use_dynamic_shifting"])

    @property
    def exponential(self) -> bool:
        """Whether a dynamic shift is exp(mu); otherwise it is mu itself."""
        return bool(self.options["time_shift_type"] == "exponential")

    def shift(self, tokens: int) -> float:
        """The shift for images with this number of tokens."""
        if not self.dynamic:
            return float(self.options["shift"])
        return flow.dynamic_shift(
            tokens,
            base_shift=self.options["base_shift"],
            max_shift=self.options["max_shift"],
            base_tokens=self.options["base_image_seq_len"],
            max_tokens=self.options["max_image_seq_len"],
            exponential=self.exponential,
        )

    def sigmas(self, steps: int, shift: float) -> Tensor:
        """The schedule of `steps` steps, float32 [steps + 1] from 1 to 0.

        With `shift_terminal` all sigmas but the last 0 are stretched linearly, so that the last step starts at this sigma. A
        single step cannot be stretched and goes from 1 to 0.
        """
        sigmas, end = flow.sigmas(steps, shift), self.options["shift_terminal"]
        if not end or steps == 1:
            return sigmas
        moved = 1 - sigmas[:-1].double()
        return torch.cat([(1 - moved * (1 - end) / moved[-1]).float(), sigmas[-1:]])


def read(folder: Path) -> Schedule:
    """Reads the schedule of a folder, with the defaults of diffusers for missing options.

    Raises:
        UserError: the scheduler would take other steps than alignbench.
    """
    import diffusers

    given = read_json(folder, PLACE)
    if (cls := given.get("_class_name", SCHEDULER)) != SCHEDULER:
        raise UserError(f"{folder}/{PLACE} is for a {cls}; alignbench supports {SCHEDULER}")
    for key, value in given.items():
        if not (key.startswith("_") or key in FOLLOWED or not value or (key in AS_DEFAULT and value == AS_DEFAULT[key])):
            raise UserError(f"{folder}/{PLACE} sets {key}, but alignbench takes the steps of a plain {SCHEDULER}")
    defaults = inspect.signature(getattr(diffusers, SCHEDULER).__init__).parameters
    options = {key: given.get(key, defaults[key].default) for key in FOLLOWED}
    _check(folder, options)
    return Schedule(options)


def plain(folder: Path, shift: Any) -> Schedule:
    """The schedule with a constant shift.

    Raises:
        UserError: the shift is not a positive number.
    """
    options = dict.fromkeys(FOLLOWED) | {"shift": shift, "use_dynamic_shifting": False}
    _check(folder, options)
    return Schedule(options)


def _check(folder: Path, options: Mapping[str, Any]) -> None:
    dynamic, end = options["use_dynamic_shifting"], options["shift_terminal"]
    if not isinstance(dynamic, bool):
        raise UserError(f"{folder}/{PLACE}: use_dynamic_shifting must be true or false, got {dynamic!r}")
    if dynamic and options["time_shift_type"] not in ("exponential", "linear"):
        raise UserError(f"{folder}/{PLACE}: time_shift_type must be exponential or linear, got {options['time_shift_type']!r}")
    for key in LINE if dynamic else ("shift",):
        positive = not dynamic or key.endswith("seq_len") or options["time_shift_type"] == "linear"
        if not _number(options[key]) or (positive and options[key] <= 0):
            raise UserError(f"{folder}/{PLACE}: {key} must be a {'positive ' * positive}number, got {options[key]!r}")
    if dynamic and options["base_image_seq_len"] == options["max_image_seq_len"]:
        raise UserError(f"{folder}/{PLACE}: max_image_seq_len must differ from base_image_seq_len")
    if end and not (_number(end) and 0 < end < 1):
        raise UserError(f"{folder}/{PLACE}: shift_terminal must be a number between 0 and 1, got {end!r}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
