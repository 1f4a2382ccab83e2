"""Records and their files; what holds for any of them is in test_properties_records."""

import json
import math
import sys
from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.records.environment import command
from alignbench.records.record import Estimate, EvalProtocol, read_result
from tests.alignbench.record_folders import write_run


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_none_in_memory_and_null_in_the_file(tmp_path: Path, number: float) -> None:
    estimate = Estimate(value=number, lower=-0.5, upper=number, n=2)
    assert (estimate.value, estimate.lower, estimate.upper) == (None, -0.5, None)
    assert json.loads(estimate.model_dump_json()) == {"value": None, "lower": -0.5, "upper": None, "n": 2}
    run = write_run(tmp_path / "r")
    result = read_result(run)
    changed = result.model_validate({**result.model_dump(), "checks": {"a": number, "b": 0.25}})
    (run / "result.json").write_text(changed.model_dump_json())
    assert read_result(run).checks == changed.checks == {"a": None, "b": 0.25}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[]", "does not hold keys and values"),
        (b"{", r"is not valid JSON \(line 1"),
        (b"\xff", "is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": 99}', "has schema version 99; this alignbench reads 1"),
        (b'{"schema_version": 1}', "is not a record of a run: run: field required"),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_result(tmp_path)


def test_a_command_line_that_is_no_text_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are UTF-8 are the letters that they stand for, also where Python took the locale's ASCII for them."""
    monkeypatch.setattr(sys, "argv", ["alignbench", "run", "--config", "a \udcff.yaml", "--out", "\udcd0\udcb4"])
    assert command() == "alignbench run --config 'a \ufffd.yaml' --out '\u0434'"


def test_names_of_files_that_are_no_text_to_this_process_can_be_recorded() -> None:
    protocol = {"source": "images", "path": "\udcd0\udcb4/\ud800", "task": "x", "prompts": 1, "pictures": 1}
    made = EvalProtocol.model_validate({**protocol, "evals": {"\udcd0\udcb4": {"model": ["\udcd0\udcb4", 1]}}})
    assert made.evals == {"\u0434": {"model": ["\u0434", 1]}}
    assert json.loads(made.model_dump_json())["path"].endswith("/?")
