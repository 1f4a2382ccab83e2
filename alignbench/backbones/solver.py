"""Folders whose scheduler is a solver of higher order, which Euler steps replace only where the user asks for them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.guidance import GuidedFolder
from alignbench.backbones.pipelines import schedule
from alignbench.backbones.pipelines.schedule import PLACE, Schedule
from alignbench.backbones.pipelines.trust import read_json

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Options with which a solver solves the ODE of a flow."""
OTHER_SIGMAS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting",
    "shift_terminal",
)  # fmt: skip
"""Options that change a solver's sigmas otherwise than by its constant flow_shift."""


class SolverFolder(GuidedFolder):
    """A folder whose scheduler may be the solver of its family instead of Euler's."""

    class Settings(GuidedFolder.Settings):
        euler: bool = False
        """Whether Euler steps replace the folder's solver, with the solver's flow_shift. Images differ from those of the
        folder's own solver, most with few steps."""

    settings: Settings
    SOLVER: ClassVar[str]
    """The class of the solver, which `SCHEDULERS` must name as well."""

    def ineffective_settings(self) -> dict[str, str]:
        found = super().ineffective_settings()
        if self.settings.euler and not self._has_solver():
            found["euler"] = "the folder's own scheduler takes Euler steps"
        return found

    def _read_schedule(self) -> Schedule:
        options = read_json(self.folder, PLACE)
        if options.get("_class_name") != self.SOLVER:
            return super()._read_schedule()
        for key, value in FLOW.items():
            if options.get(key) != value:
                raise UserError(
                    f"{self.folder}/{PLACE} is not a schedule of a flow: {key} is {options.get(key)!r}, not {value!r}"
                )
        if not self.settings.euler:
            raise UserError(
                f"{self.folder} is for a {self.SOLVER}, but alignbench takes Euler steps; set backbone.euler=true to take them "
                "with its schedule"
            )
        for key in OTHER_SIGMAS:
            if options.get(key):
                raise UserError(
                    f"{self.folder}/{PLACE} sets {key}, but backbone.euler=true can only follow a constant flow_shift"
                )
        return schedule.plain(self.folder, options.get("flow_shift", 1.0))

    def drawn_by_pipeline(self, prompts: Sequence[str], noise: Tensor) -> np.ndarray:
        if self.settings.euler and self._has_solver():
            raise UserError("the folder's own solver takes other steps (backbone.euler=true)")
        return super().drawn_by_pipeline(prompts, noise)

    def _has_solver(self) -> bool:
        options: dict[str, Any] = read_json(self.folder, PLACE)
        return options.get("_class_name") == self.SOLVER
