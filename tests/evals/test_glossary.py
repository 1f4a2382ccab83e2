"""The glossary defines every metric, and says the same of its direction as the code."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import load_scorer, registry
from alignbench.backbones.gaussian_mixture import DIRECTIONS
from alignbench.evaluation.curve import PATH_KL
from alignbench.figures.metric_names import MEANINGS
from alignbench.load import load_eval
from alignbench.scorer import Metric
from evals.base_coverage import METRICS
from tests.support.command_line import ROOT

ARROWS = {"↑": True, "↓": False, "-": None}
LABELS = {"ocr_judge", "ocr_judge_exact"}
"""Names that the shipped tasks give to a second `ocr`."""


def entries() -> dict[str, list[str]]:
    """Metric -> definition, range, arrow and eval, from the glossary's table."""
    section = (ROOT / "docs" / "glossary.md").read_text().split("\n## Metrics\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def entry(metric: str) -> list[str]:
    """The entry of a metric, whose name may end in an aspect, a type, a number or a sigma."""
    table = entries()
    families = [name for name in table if name.endswith("_X") and metric.startswith(name[:-1])]
    return table[metric] if metric in table else table[families[0]]


def names_of(eval_: str) -> list[str]:
    return [metric for metric, row in entries().items() if row[3] == f"`{eval_}`"]


def test_every_entry_has_a_definition_a_range_and_a_direction() -> None:
    for metric, row in entries().items():
        assert len(row) == 4, metric
        assert all(row), metric
        assert row[2] in ARROWS, metric


@pytest.mark.parametrize("name", registry.names("evals"))
def test_every_eval_has_entries_with_its_directions(name: str) -> None:
    cls: Any = registry.find("evals", name, Metric)
    assert names_of(name)
    for metric in names_of(name):
        assert ARROWS[entry(metric)[2]] is cls.higher_is_better(object.__new__(cls), metric), metric


@pytest.mark.parametrize("metric", list(DIRECTIONS))
def test_every_metric_of_the_toy_has_an_entry_with_its_direction(metric: str) -> None:
    assert ARROWS[entry(metric)[2]] is DIRECTIONS[metric]
    assert entry(metric)[3] == "`gaussian_mixture`"


def test_names_with_a_meaning_and_the_path_kl_have_an_entry() -> None:
    assert [metric for metric in {*MEANINGS, PATH_KL} - LABELS if not entry(metric)] == []


def test_names_in_the_table_of_evals_have_an_entry() -> None:
    table = (ROOT / "docs" / "evals.md").read_text().split("## What each eval measures")[1].split("\n\n")[1]
    listed = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+\*?)`", line.split("|")[2])}
    assert len(listed) > 25
    for name in listed:
        assert entry(re.sub(r"_(\*|K)$", "_X", name)), name


def test_whatever_a_quick_eval_measures_has_an_entry() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    prompt = "a red circle"
    measured: set[str] = set(load_scorer("quality").measure(images, [prompt] * 4))
    for name, settings in (
        ("diversity", {}),
        ("mode_coverage", {}),
        ("attribute_difference", {}),
        ("best_of", {"eval": "quality"}),
    ):
        metric: Any = load_eval(name, **settings)
        measured |= set(metric.measure(images, torch.randn(4, 8), prompt))
    assert {"pixel_diversity", "coverage_place", "difference_size", "best_of_4"} <= measured
    for name in {*measured, *METRICS}:
        assert entry(name), name
