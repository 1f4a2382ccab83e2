"""What the folder of a run says that has not ended."""

from pathlib import Path

from alignbench.config.run_config import load_config
from alignbench.errors import UserError
from alignbench.records.record import CONFIG, Budget, Protocol, Result, RunInfo
from alignbench.records.tables import read_metrics

UNFINISHED = "unfinished"
"""The status of the record that `unfinished_record` makes."""
COUNTED = ("model_rows_rollout", "model_rows_train", "reward_calls")


def unfinished_record(folder: Path) -> Result:
    """A record without metrics for a run that has not ended, from its configuration and its metrics so far.

    Raises:
        UserError: the folder is not that of a run, or cannot be read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder (no {CONFIG})")
    config = load_config(file=file)
    table = read_metrics(folder)
    budget = Budget()
    if table is not None and len(table):
        spent = {name: int(table[name].iloc[-1]) for name in COUNTED if name in table}
        budget = Budget(**spent, seconds=float(table["seconds"].sum()) if "seconds" in table else 0.0)
    names = {kind: getattr(config, kind).name for kind in ("objective", "sampler", "backbone")}
    evaluation = config.evaluation
    return Result(
        run=RunInfo(
            id=folder.resolve().name, **names, task=config.task, seed=config.seed, preset=config.preset, started="",
            iterations=0 if table is None else len(table), status=UNFINISHED,
        ),
        budget=budget,
        metrics={},
        alarms=[],
        checks={},
        protocol=Protocol(
            prompts=evaluation.prompts, images_per_prompt=evaluation.images_per_prompt, steps=evaluation.steps or 0,
            guidance=config.guidance or 0.0, weights="raw", noise_seed=evaluation.seed, evals={},
        ),
        environment={},
        config=config.resolved(),
    )  # fmt: skip
