"""What is shown on narrow, dumb and colour-forced terminals."""

import io
import re
from typing import Any

import pytest
from rich.console import Console as RichConsole
from rich.table import Table

from alignbench.cli.console import format_interval, moves, print_table
from alignbench.cli.views.run import change_label
from alignbench.records.record import Estimate, MetricRecord

NUMBERS = ("0.123456", "+4.12e-06 (-2.56e-06 to +1.57e-05)", "1,234,567", "0.9876")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_table_loses_no_digit_at_any_width(width: int, term: str) -> None:
    screen = Screen()
    table = Table("metric", *"abcd", title="a title that is longer than a narrow terminal is wide")
    table.add_row("a metric with a long name", *NUMBERS)
    print_table(RichConsole(file=screen, width=width, _environ={"TERM": term}), table)
    words = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    for number in NUMBERS:
        for part in number.split():
            assert part in words


@pytest.mark.parametrize(
    ("stream", "options", "animated"),
    [
        (Screen, {"width": 100, "_environ": {"TERM": "xterm"}}, True),
        (Screen, {"width": 20, "_environ": {"TERM": "xterm"}}, False),
        (Screen, {"width": 100, "_environ": {"TERM": "dumb"}}, False),
        (io.StringIO, {"width": 100, "_environ": {"TERM": "xterm", "FORCE_COLOR": "1"}}, False),
        (io.StringIO, {"width": 100, "_environ": {"TERM": "xterm", "TTY_COMPATIBLE": "1"}}, False),
    ],
)
def test_bars_move_on_wide_terminals_alone(stream: type[io.StringIO], options: Any, animated: bool) -> None:
    assert moves(RichConsole(file=stream(), **options)) == animated


def test_a_mean_without_an_interval_says_so() -> None:
    assert format_interval(Estimate(value=0.12, lower=0.08, upper=0.16, n=9)) == "+0.12 (+0.08 to +0.16)"
    assert format_interval(Estimate(value=0.5, lower=None, upper=None, n=1), sign="") == "0.5 (no interval)"


def test_an_equal_change_of_all_prompts_is_decided_by_the_sign_test() -> None:
    change = Estimate(value=-0.5, lower=None, upper=None, n=9)
    metric = MetricRecord(base=change, final=change, difference=change, higher_is_better=True, role="reward", p_rise=1 - 0.5**9)
    assert change_label(metric) == "worse"
    assert change_label(metric.model_copy(update={"p_rise": 0.5**9})) == "better"
    assert change_label(metric.model_copy(update={"p_rise": 0.125})) == "no clear change"  # three prompts
    assert change_label(metric.model_copy(update={"p_rise": None})) == "no clear change"
