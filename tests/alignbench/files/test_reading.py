"""What is not a record is refused in one sentence, before it costs anything."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignbench import UserError
from alignbench.files import json_files, reading
from alignbench.files.reading import read_record, read_table
from alignbench.records.distributions import read_distributions
from alignbench.records.tables import read_evals, read_metrics
from tests.alignbench.record_folders import write_run


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [read_record, read_table])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device", "nothing"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, read: Any, kind: str) -> None:
    file = tmp_path / "file"
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link to a device":
            file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="No such file" if kind == "nothing" else "is not a regular file"):
        read(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (json.loads('{"a":' * 70 + "1" + "}" * 70), "more than 60 levels"),
        ({"a": [10**30]}, "64 bits"),
        ({"a": {"\ud800": 1}}, "not valid Unicode"),
        ([1], "does not hold keys and values"),
    ],
)
def test_json_that_is_not_a_record_is_refused(tmp_path: Path, content: Any, why: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=why):
        read_record(tmp_path / "r.json")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', "[" * 100_000, "{", ""])
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"not valid JSON|not finite"):
        read_record(tmp_path / "r.json")


def test_a_file_beyond_its_limit_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"a": "x" * 2**20}))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        json_files.read_json(tmp_path / "r.json", "record", limit=2**20)


def test_a_small_file_that_unfolds_to_many_rows_is_refused_unread(tmp_path: Path) -> None:
    file, part = tmp_path / "t.parquet", pa.table({"a": pa.array(np.zeros(10_000_000, dtype=np.int8))})
    with pq.ParquetWriter(file, part.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(part)
    assert file.stat().st_size < 200_000
    with pytest.raises(UserError, match="30000000 rows of 1 columns are more than a record can have"):
        read_table(file)


def test_one_long_text_in_many_rows_is_counted_as_often_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"prompt": ["x" * 1000] * 1000}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet")["prompt"].iloc[999] == "x" * 1000
    monkeypatch.setattr(reading, "MAX_TABLE_BYTES", 900_000)
    with pytest.raises(UserError, match="its texts are longer than"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"a": [[1], [2]]}, "'a' should hold numbers or texts, but holds list"),
        ({"a": [b"x"]}, "but holds binary"),
        ({"whole": [0.5]}, "'whole' should hold whole numbers, but holds double"),
        ({"whole": ["x"]}, "but holds string"),
        ({"whole": [None, 1]}, "has missing values"),
        ({"other": [1]}, "has no column 'whole'"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, table: dict[str, Any], why: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=why):
        read_table(tmp_path / "t.parquet", {"whole": "whole"} if "a" not in table else {})


def test_numbers_may_be_whole_missing_or_truths(tmp_path: Path) -> None:
    table = pa.table({"n": [1, 2], "f": [0.5, None], "t": [True, False], "nothing": pa.nulls(2), "s": ["a", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", {"n": "number", "f": "number", "t": "number"})
    assert found["n"].tolist() == [1, 2]
    assert found["f"].isna().tolist() == [False, True]
    assert found["nothing"].dtype == np.float64
    assert found["s"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("evals", {"prompt_index": 0}, "the same phase, metric, prompt_index and image"),
        ("evals", {"prompt_index": 0, "image": range(8)}, "two prompts have the same prompt_index"),
        ("evals", {"value": np.inf}, "a value is infinite"),
        ("metrics", {"iteration": 1}, "two rows have the same iteration"),
        ("metrics", {"seconds": np.nan}, "model_rows and seconds must be finite"),
        ("distributions", {"mass": -1.0}, "masses not negative"),
        ("distributions", {"iteration": 0}, "the target's or the base model's distribution is missing"),
        ("distributions", {"mass": 0.0}, "has no mass"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], why: str) -> None:
    run = write_run(tmp_path / "run")
    distributions = pd.DataFrame({"iteration": [-1, 0, 2], "x": 0.0, "y": 0.0, "mass": 1.0, "mode": 0})
    distributions.to_parquet(run / "distributions.parquet")
    reads: dict[str, Any] = {"evals": read_evals, "metrics": read_metrics, "distributions": read_distributions}
    assert all(len(read(run)) for read in reads.values())
    file = run / f"{name}.parquet"
    pd.read_parquet(file).assign(**changes).to_parquet(file)
    with pytest.raises(UserError, match=why):
        reads[name](run)


def test_without_a_table_there_is_none(tmp_path: Path) -> None:
    assert read_evals(tmp_path) is read_metrics(tmp_path) is read_distributions(tmp_path) is None
