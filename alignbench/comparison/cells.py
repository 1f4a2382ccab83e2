"""Running one cell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError, UserError
from alignbench.files.writing import refuse_links
from alignbench.runtime import launch


def run_cell(
    config: RunConfig,
    folder: Path,
    bases: dict[str, Any] | None = None,
    report: Callable[..., None] = lambda *_: None,
    processes: int = 1,
) -> str | None:
    """Runs or resumes one cell; returns None, or the sentence that says why it failed.

    Args:
        bases: evaluations of base models that earlier cells left, which later ones reuse; see `training.run.run`.
        report: called with the numbers of each iteration and the progress.
        processes: how many processes share the cell; with more than one, this process can run no other cell afterwards.
    """
    from alignbench.training.progress import Reporting
    from alignbench.training.run import run

    resume = (folder / "config.yaml").exists()
    try:
        refuse_links(folder.parent, folder.name)
        with launch.several(processes, _share_cell, config, folder, resume):
            run(config, folder, console=Reporting(report), resume=resume, bases=bases)
    except (UserError, RunError) as error:
        return str(error)
    except Exception as error:  # a plug-in's fault must not sink the other cells
        return f"{type(error).__name__}: {error}"
    return None


def _share_cell(config: RunConfig, folder: Path, resume: bool) -> None:
    from alignbench.training.run import run

    run(config, folder, resume=resume)
