"""Sends the numbers and example images of a run to TensorBoard or Weights & Biases through accelerate's trackers.

A tracker is used only if the configuration's `trackers` names it. Both write into the run's folder; nothing leaves the machine
unless WANDB_MODE asks for it.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from alignbench.config.run_config import RunConfig, Tracker
from alignbench.errors import UserError, did_you_mean
from alignbench.figures import sheets
from alignbench.records.record import Result

PROJECT = "alignbench"
EXAMPLES = 8
"""Number of prompts whose images are logged."""
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises UserError where a tracker's package is not installed, or where WANDB_MODE is not one of its modes."""
    mode = os.environ.get("WANDB_MODE", "offline")
    if "wandb" in names and mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE is {mode!r}{did_you_mean(mode, WANDB_MODES)}")
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"trackers names {name}, which is not installed: pip install 'alignbench[{name}]', or leave it out")


class Tracking:
    """The trackers of one run, which are open while it is entered; without trackers it does nothing.

    The files of TensorBoard are in `tensorboard/` of the run's folder, so that `tensorboard --logdir` shows all runs below a
    folder by their paths. Those of Weights & Biases are in `wandb/`, for `wandb sync`; WANDB_MODE=online sends them at once.

    Args:
        config: the configuration of the run, all of which is logged.
        out: the run's folder.
        iteration: the iteration from which the run starts or resumes; numbers of later ones are hidden in TensorBoard.
    """

    def __init__(self, config: RunConfig, out: Path, iteration: int) -> None:
        self.config = config
        self.trackers = [_TRACKERS[name](out, iteration) for name in config.trackers]

    def __enter__(self) -> Self:
        if self.trackers:
            PartialState()  # their logger refuses to work without it
        for tracker in self.trackers:
            tracker.start()
            tracker.store_init_configuration(_flat(self.config.resolved()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs the numbers of one iteration."""
        self._log({f"train/{key}": value for key, value in row.items() if key != "iteration"}, row["iteration"])

    def log_result(self, result: Result) -> None:
        """Logs each metric of base and trained model, and their difference, at the last iteration."""
        numbers = {}
        for name, metric in result.metrics.items():
            for phase in ("base", "final", "difference"):
                numbers[f"{phase}/{name}"] = getattr(metric, phase).value
        self._log(numbers, result.run.iterations)

    def log_images(self, name: str, images: np.ndarray, images_per_prompt: int, step: int) -> None:
        """Logs a sheet of the images of the first prompts.

        Args:
            name: what the images are of; their key is `samples/NAME`.
            images: uint8 [N, H, W, 3], prompt by prompt.
            images_per_prompt: the number of images of each prompt.
            step: the number of iterations until then.
        """
        if not self.trackers:
            return
        sheet = np.asarray(sheets.grid(images[: EXAMPLES * images_per_prompt], images_per_prompt))[None]
        for tracker in self.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"samples/{name}": sheet}, step=step, **layout)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)


def _tensorboard(out: Path, iteration: int) -> GeneralTracker:
    return TensorBoardTracker("tensorboard", out, purge_step=iteration or None)


def _wandb(out: Path, iteration: int) -> GeneralTracker:
    mode = os.environ.get("WANDB_MODE", "offline")
    quiet = {"silent": True, "console": "off"}  # stdout and stderr are the run's own
    return WandBTracker(PROJECT, name=out.name, dir=str(out), mode=mode, settings=quiet)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings under dotted keys; values that are neither numbers nor texts become texts."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in data.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            flat |= _flat(value, dotted)
        else:
            flat[dotted] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
