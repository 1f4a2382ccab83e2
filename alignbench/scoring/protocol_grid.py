"""`eval` of several models by several protocols: whether the ranking of methods depends on how images are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.analysis import protocols
from alignbench.backbone import device_named
from alignbench.comparison.sweeps import point_text
from alignbench.config.inference import InferenceConfig
from alignbench.config.run_config import EvaluationConfig, RunConfig, merged_layers
from alignbench.errors import UserError, did_you_mean
from alignbench.evaluation.curve import curve_rows
from alignbench.files.writing import claimed
from alignbench.load import threads_of
from alignbench.records.environment import environment, now
from alignbench.records.record import Estimate
from alignbench.scoring.protocol_record import FILE, Agreement, FlipRecord, GridCell, GridModel, ProtocolGrid
from alignbench.scoring.score import Advance, Loaded
from alignbench.settings import validate
from alignbench.tasks import check_backbone, load_task

FIXED = ("prompts", "every", "validation_prompts", "validation_images")
"""Keys of `evaluation` that cannot be swept: prompts are what values are paired by, and the others are about a training."""
KEYS = [
    "guidance",
    *(f"evaluation.{key}" for key in EvaluationConfig.model_fields if key not in FIXED),
    *(f"inference.{key}" for key in InferenceConfig.model_fields),
]
"""What `eval --sweep` can vary."""


@dataclass(frozen=True)
class Model:
    """A model that is evaluated.

    Attributes:
        config: its configuration, with the task and the protocol.
        run: the folder of the run whose newest checkpoint is evaluated; None for the backbone as it is.
    """

    config: RunConfig
    run: Path | None = None

    @property
    def method(self) -> str:
        """The pair that trained it; runs of one pair are the seeds of one method."""
        if self.run is None:
            return str(self.config.backbone.name)
        return f"{self.config.objective.title} x {self.config.sampler.title}"


def points_of(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The protocols of a grid: every combination of the swept values; one empty point without a sweep.

    Raises:
        UserError: a key is not about how images are drawn, or has no values or one of them twice.
    """
    for key, values in sweep.items():
        if key not in KEYS:
            raise UserError(f"eval --sweep cannot vary {key!r}{did_you_mean(key, KEYS) or '; it varies ' + ', '.join(KEYS)}")
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"sweep {key} needs different values, as {key}=VALUE,VALUE,...")
    return [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]


def configured(config: RunConfig, point: Mapping[str, Any]) -> RunConfig:
    """The configuration at a point of the grid.

    Raises:
        UserError: a value does not fit; the sentence names the point.
    """
    nested: dict[str, Any] = {}
    for dotted, value in point.items():
        section, _, key = dotted.partition(".")
        nested = merged_layers(nested, {section: {key: value} if key else value})
    where = f"sweep {point_text(point)}" if point else "configuration"
    return validate(RunConfig, merged_layers(config.resolved(), nested), where=where)


def score_grid(
    models: Sequence[Model],
    sweep: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    evals: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    advance: Advance = lambda what: None,
) -> ProtocolGrid:
    """Evaluates every model by every protocol, each as `eval` does, and compares the rankings.

    Args:
        models: the models, all on one task.
        sweep: dotted key of the configuration -> its values.
        out: a new folder for `protocols.json`, `protocols.parquet` and a folder of `eval` for each cell.
        evals, settings, advance: as for `score_model`.

    Raises:
        UserError: models have different tasks or numbers of prompts, or one cannot draw the prompts; a key or value is wrong;
            or the folder exists already.
        RunError: a scorer failed.
    """
    points = points_of(sweep)
    configs = {(m, p): configured(model.config, point) for m, model in enumerate(models) for p, point in enumerate(points)}
    asked = {(model.config.task, model.config.evaluation.prompts) for model in models}
    if len(asked) > 1:
        raise UserError("models of one grid need the same task and evaluation.prompts; choose them by --task and --set")
    if len({str(model.run) for model in models}) < len(models):
        raise UserError("a checkpoint is there twice; leave one of them out")
    task = load_task(models[0].config.task)
    for model in models:
        check_backbone(task, model.config.backbone.name)
    with claimed(out):
        cells, table, directions = _evaluated(models, configs, out, Loaded(evals, settings or {}, advance))
        table.to_parquet(out / "protocols.parquet", index=False)
        texts = [point_text(point) or "as configured" for point in points]
        methods = [model.method for model in models]
        agreement, flips = compared(table, methods, texts)
        first = models[0].config
        surroundings = environment(str(device_named(first.device)), threads_of(first))
        grid = ProtocolGrid(
            made=now(),
            command=str(surroundings.get("command")),
            models=[GridModel(method=model.method, path=str(model.run or model.config.backbone.name)) for model in models],
            sweep={key: list(values) for key, values in sweep.items()},
            points=texts,
            higher_is_better=directions,
            cells=cells,
            agreement=agreement,
            flips=flips,
            environment=surroundings,
        )
        grid.write(out / FILE)
    return grid


def _evaluated(
    models: Sequence[Model], configs: Mapping[tuple[int, int], RunConfig], out: Path, loaded: Loaded
) -> tuple[list[GridCell], pd.DataFrame, dict[str, bool | None]]:
    """Evaluates every cell into a folder of its own.

    Args:
        configs: (model, point) -> the configuration of that cell.

    Returns:
        The cells by point and model; a row for each cell, metric and prompt; metric -> whether a higher value is better.
    """
    cells: list[GridCell] = []
    tables: list[pd.DataFrame] = []
    directions: dict[str, bool | None] = {}
    advance = loaded.advance
    for m, p in sorted(configs, key=lambda cell: _loads_least(configs[cell], cell)):
        name = f"model-{m + 1}-point-{p + 1}"
        loaded.advance = _within(advance, f"cell {len(cells) + 1} of {len(configs)}")
        folder = out / "cells" / name
        folder.mkdir(parents=True)
        record, evaluation = loaded.score(configs[m, p], models[m].run, folder)
        rows = record.protocol.model_rows_per_image or 0
        means = {metric: estimate.value for metric, estimate in record.metrics.items()}
        cells.append(GridCell(id=name, model=m, point=p, model_rows_per_image=rows, means=means))
        directions |= evaluation.directions
        table = curve_rows(evaluation, 0, 0, 0.0)[["prompt_index", "prompt", "metric", "value"]]
        tables.append(table.assign(model=m, point=p))
    return sorted(cells, key=lambda cell: (cell.point, cell.model)), pd.concat(tables, ignore_index=True), directions


def compared(table: pd.DataFrame, methods: Sequence[str], points: Sequence[str]) -> tuple[list[Agreement], list[FlipRecord]]:
    """Compares the ranking by each protocol with that by the first one.

    Args:
        table: a row for each model, point, metric and prompt: model, point, metric, prompt_index, value.
        methods: the method of each model.
        points: the names of the protocols.
    """
    names = list(dict.fromkeys(methods))
    agreement: list[Agreement] = []
    found: list[FlipRecord] = []
    if len(names) < 2:
        return agreement, found
    of_method = table.assign(method=table["model"].map(lambda m: names.index(methods[m])))
    for metric, rows in of_method.groupby("metric", sort=False):
        mean = rows.groupby(["point", "method", "prompt_index"])["value"].mean().unstack("prompt_index")
        every = pd.MultiIndex.from_product([range(len(points)), range(len(names))])
        values = mean.reindex(every).to_numpy(dtype=np.float64).reshape(len(points), len(names), -1)
        of_points = [protocols.flips(values[0], other) for other in values[1:]]
        corrected = protocols.corrected(of_points, len(of_points) * len(names) * (len(names) - 1) // 2)
        for point, other, flips, p_values in zip(points[1:], values[1:], of_points, corrected, strict=True):
            tau = protocols.rank_correlation(values[0], other)
            agreement.append(Agreement(metric=str(metric), point=point, tau=Estimate.of(tau)))
            found += [
                FlipRecord(
                    metric=str(metric),
                    point=point,
                    first=names[flip.first],
                    second=names[flip.second],
                    before=Estimate.of(flip.before),
                    after=Estimate.of(flip.after),
                    p=p,
                    beyond_chance=p < protocols.LEVEL,
                )
                for flip, p in zip(flips, p_values, strict=True)
            ]
    return agreement, found


def _loads_least(config: RunConfig, cell: tuple[int, int]) -> tuple[str, str, int, int]:
    """The order of cells in which a model is loaded only where the backbone or the guidance changes."""
    return str(config.backbone), str(config.guidance), *cell


def _within(advance: Advance, where: str) -> Advance:
    return lambda what: advance(f"{where}: {what}")
