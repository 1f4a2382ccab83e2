"""Whether a run can go on beyond its last iteration and be what a longer run would have been."""

import numpy as np

from alignbench.config.run_config import BudgetConfig, RunConfig
from alignbench.errors import UserError
from alignbench.sampler import Sampler

PROGRESS = (0.0, 0.5, 1.0)
"""Points of the training at which a sampler's plans are compared."""


def check_extension(former: RunConfig, config: RunConfig, sampler: Sampler, what: str) -> None:
    """Raises UserError where a longer run would have been another one from its first iteration on, or nothing is to be added.

    Args:
        former: the configuration that the run had so far.
        config: the same with more iterations.
        sampler: the run's sampler.
        what: the run, as messages name it.
    """
    if former.iterations is None or former.budget != BudgetConfig():
        raise UserError(
            f"{what} ends by its budget, so that --iterations cannot extend it; start a new run with a larger budget"
        )
    if config.iterations is None or config.iterations <= former.iterations:
        raise UserError(f"{what} has {former.iterations} iterations already; --iterations must be larger to extend it")
    again = f"start a new run with --iterations {config.iterations}"
    if config.optimizer.schedule != "constant":
        raise UserError(
            f"{what} cannot be extended: its learning rate falls over its {former.iterations} iterations "
            f"(optimizer.schedule={config.optimizer.schedule}); {again}"
        )
    plans = [sampler.plan(progress, np.random.default_rng(0)) for progress in PROGRESS]
    if any(plan != plans[0] for plan in plans):
        raise UserError(
            f"{what} cannot be extended: the plans of sampler {sampler.name} follow the progress through its "
            f"{former.iterations} iterations; {again}"
        )
