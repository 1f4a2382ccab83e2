"""alignbench compares alignment objectives and rollout samplers on one flow-matching text-to-image backbone.

Everything that the author of a plug-in needs can be imported from here, and so can the functions for notebooks: `run`,
`compare`, `evaluate`, `report` and `load_results`. The names are imported on first use, so `import alignbench` itself loads
nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignbench.backbone import Backbone as Backbone
    from alignbench.cli.notebooks import compare as compare
    from alignbench.cli.notebooks import evaluate as evaluate
    from alignbench.cli.notebooks import load_results as load_results
    from alignbench.cli.notebooks import report as report
    from alignbench.errors import NonFiniteError as NonFiniteError
    from alignbench.errors import RunError as RunError
    from alignbench.errors import UserError as UserError
    from alignbench.load import load_backbone as load_backbone
    from alignbench.load import load_objective as load_objective
    from alignbench.load import load_sampler as load_sampler
    from alignbench.load import load_scorer as load_scorer
    from alignbench.objective import Needs as Needs
    from alignbench.objective import Objective as Objective
    from alignbench.rollouts.executor import rollout as rollout
    from alignbench.rollouts.forest import RolloutForest as RolloutForest
    from alignbench.rollouts.plan import Plan as Plan
    from alignbench.rollouts.plan import Side as Side
    from alignbench.rollouts.plan import Step as Step
    from alignbench.sampler import Sampler as Sampler
    from alignbench.scorer import Scorer as Scorer
    from alignbench.scorer import SetMetric as SetMetric
    from alignbench.settings import Settings as Settings
    from alignbench.training.run import run as run

__version__ = "0.1.0"

_MODULES = {
    "Backbone": "backbone",
    "Needs": "objective",
    "NonFiniteError": "errors",
    "Objective": "objective",
    "Plan": "rollouts.plan",
    "RolloutForest": "rollouts.forest",
    "RunError": "errors",
    "Sampler": "sampler",
    "Scorer": "scorer",
    "SetMetric": "scorer",
    "Settings": "settings",
    "Side": "rollouts.plan",
    "Step": "rollouts.plan",
    "UserError": "errors",
    "compare": "cli.notebooks",
    "evaluate": "cli.notebooks",
    "load_backbone": "load",
    "load_objective": "load",
    "load_results": "cli.notebooks",
    "load_sampler": "load",
    "load_scorer": "load",
    "report": "cli.notebooks",
    "rollout": "rollouts.executor",
    "run": "training.run",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use."""
    if name in _MODULES:
        value = getattr(import_module(f"alignbench.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'alignbench' has no attribute {name!r}")
