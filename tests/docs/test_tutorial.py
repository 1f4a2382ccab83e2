"""The tutorial notebook: its cells run, and show what its text says."""

import io
import json
from contextlib import chdir, redirect_stdout
from typing import Any
from unittest import mock

import pytest

from tests.support.command_line import ROOT

NOTEBOOK = ROOT / "docs" / "tutorials" / "gaussian_mixture.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
LARGEST = 200_000
"""Bytes of the notebook with its outputs."""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The variables after all cells, and what they printed."""
    variables: dict[str, Any] = {"__name__": "tutorial"}
    printed = io.StringIO()
    folder = tmp_path_factory.mktemp("tutorial")
    no_plots = mock.patch("alignbench.figures.plots.plot_run")  # of the runs; the notebook draws its own
    with chdir(folder), mock.patch("tempfile.tempdir", str(folder)), redirect_stdout(printed), no_plots:
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), variables)
    return variables, printed.getvalue()


def test_the_methods_end_as_the_text_says(executed: tuple[dict[str, Any], str]) -> None:
    grpo, tmpo = (record.metrics for record in executed[0]["records"].values())
    assert grpo["modes_covered"].final.value < 0.7  # of three modes, 1, 2/3 or 1/3 is left for each of four prompts
    assert tmpo["modes_covered"].final.value == 1
    assert tmpo["kl_base"].final.value < 1 < grpo["kl_base"].final.value


def test_no_method_lies_above_the_front(executed: tuple[dict[str, Any], str]) -> None:
    for record in executed[0]["records"].values():
        assert record.metrics["exact_reward"].final.value < record.metrics["best_reward_at_kl"].final.value


def test_the_committed_outputs_are_those_of_its_cells(executed: tuple[dict[str, Any], str]) -> None:
    printed = [output for cell in CODE for output in cell["outputs"] if output["output_type"] == "stream"]
    costs = "".join(printed[0]["text"])
    assert {output["name"] for output in printed} == {"stdout"}
    assert costs.startswith("independent: 27 leaves, 216 rows to draw")
    assert costs in executed[1]


def test_the_notebook_is_executed_and_small() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert NOTEBOOK.stat().st_size < LARGEST
