from pathlib import Path
from typing import Any

from tests.benchmarks.table import plot, table


def timed(name: str, group: str, seconds: float, **extra: object) -> dict[str, Any]:
    rounds = [0.5 * seconds, seconds, 2 * seconds]
    return {"name": name, "group": group, "stats": {"median": seconds, "data": rounds}, "extra_info": extra}


REPORT: dict[str, Any] = {
    "datetime": "2026-01-01T00:00:00",
    "machine_info": {"machine": "x86_64", "cpu": {"brand_raw": "A processor", "count": 2}},
    "benchmarks": [
        timed("test_ours[a-b]", "training pass: tree, tiny", 0.2, rows=13, model_seconds=[0.098, 0.19, 0.392]),
        timed("test_per_leaf[a-b]", "training pass: tree, tiny", 1.0, rows=81),
        timed("test_rollout_against_k[9]", "rollout against K, tiny", 0.026, at=9, rows=26),
        timed("test_rollout_against_k[27]", "rollout against K, tiny", 0.066, at=27, rows=44),
    ],
}


def test_the_table_compares_with_ours_and_says_what_is_not_the_models() -> None:
    lines = table(REPORT).splitlines()
    assert lines[0] == "2026-01-01T00:00:00, A processor, 2 cores"
    assert "| ours | 200.0 | 13 | 15.38 | 1.00 |" in lines
    assert "| per leaf | 1000.0 | 81 | 12.35 | 5.00 |" in lines
    # 2, 5 and 2 % of rounds that took 0.1, 0.2 and 0.4 seconds.
    assert "Not the model's: 2.0 % of ours (quartiles 2.0 to 5.0)." in lines
    assert "| 27 | 66.0 | 44 | 1.50 |  |" in lines
    assert sum(line.startswith("Not the model's") for line in lines) == 1


def test_the_exponent_is_the_slope_of_log_time_over_log_rows() -> None:
    # Times 1, 2, 8 for rows 1, 4, 16: the slope of 0, 1, 3 over 0, 2, 4 in powers of two is 3 / 4.
    grows = [timed(f"test_grows[{n}]", "rollout against K, x", s, at=n, rows=n) for n, s in ((1, 1.0), (4, 2.0), (16, 8.0))]
    assert "Grows as rows^0.75." in table({**REPORT, "benchmarks": grows}).splitlines()
    # The two of the report: log(66 / 26) over log(44 / 26).
    assert "Grows as rows^1.77." in table(REPORT).splitlines()
    same_rows = [timed(f"test_side[{n}]", "rollout against side, x", 1.0, at=n, rows=5) for n in (8, 16)]
    assert "Grows" not in table({**REPORT, "benchmarks": same_rows})


def test_the_plot_has_a_panel_for_each_cost_that_grows(tmp_path: Path) -> None:
    assert plot(REPORT, tmp_path / "bench.png") == [tmp_path / "bench.png"]
    assert (tmp_path / "bench.png").stat().st_size > 5_000


def test_without_such_a_panel_there_is_no_plot(tmp_path: Path) -> None:
    assert plot({**REPORT, "benchmarks": REPORT["benchmarks"][:2]}, tmp_path / "bench.png") == []
    assert not (tmp_path / "bench.png").exists()
