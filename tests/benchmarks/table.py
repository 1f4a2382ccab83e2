"""Makes a table and a plot of what `pytest --benchmark-json FILE` wrote: python -m tests.benchmarks.table FILE."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import linear_regression, quantiles
from typing import Any

from matplotlib import pyplot as plt

Benchmark = dict[str, Any]


def table(report: dict[str, Any]) -> str:
    """Markdown. Medians; with a contender named `ours` in its group, how many times as long as that each takes, and how
    much of its own time is not the model's, round by round; with groups that grow, the fitted exponent."""
    machine, lines = report["machine_info"], []
    cpu = machine.get("cpu", {})
    lines += [f"{report['datetime']}, {cpu.get('brand_raw', machine.get('machine'))}, {cpu.get('count', '?')} cores", ""]
    for group, members in _groups(report).items():
        by_name = {_contender(b): b for b in members}
        ours = by_name.get("ours")
        lines += [f"### {group}", "", "| | median ms | rows | ms a row | times ours |", "|---|---|---|---|---|"]
        for name, b in by_name.items():
            ms, rows = 1000 * b["stats"]["median"], b["extra_info"]["rows"]
            times = f"{b['stats']['median'] / ours['stats']['median']:.2f}" if ours else ""
            lines.append(f"| {name} | {ms:.1f} | {rows} | {ms / rows:.2f} | {times} |")
        if ours and "model_seconds" in ours["extra_info"]:
            pairs = zip(ours["extra_info"]["model_seconds"], ours["stats"]["data"], strict=True)
            shares = [100 * (1 - model / whole) for model, whole in pairs]
            low, middle, high = quantiles(shares, n=4)
            lines += ["", f"Not the model's: {middle:.1f} % of ours (quartiles {low:.1f} to {high:.1f})."]
        exponent = _exponent(members)
        if exponent is not None:
            lines += ["", f"Grows as rows^{exponent:.2f}."]
        lines.append("")
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> list[Path]:
    """Measured time of the `against` groups, and what it would be if it grew as the rows do; nothing where none was run."""
    groups = {g: members for g, members in _groups(report).items() if " against " in g}
    if not groups:
        return []
    figure, axes = plt.subplots(1, len(groups), figsize=(3 * len(groups), 2.8), layout="constrained", squeeze=False)
    for axis, (group, members) in zip(axes.flat, groups.items(), strict=True):
        at = [b["extra_info"]["at"] for b in members]
        ms = [1000 * b["stats"]["median"] for b in members]
        rows = [b["extra_info"]["rows"] for b in members]
        axis.plot(at, ms, marker="o", label="measured")
        axis.plot(at, [ms[0] * r / rows[0] for r in rows], linestyle=":", color="gray", label="as the rows")
        what, _, rest = group.partition(" against ")
        axis.set(title=what, xlabel=rest, ylabel="ms", xticks=at, ylim=(0, None))
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return [file]


def _exponent(members: list[Benchmark]) -> float | None:
    """The slope of log time over log rows, by least squares, in a group that grows; None where the rows stay the same."""
    rows = [b["extra_info"]["rows"] for b in members]
    if "at" not in members[0]["extra_info"] or len(set(rows)) < 2:
        return None
    return linear_regression(list(map(math.log, rows)), [math.log(b["stats"]["median"]) for b in members]).slope


def _groups(report: dict[str, Any]) -> dict[str, list[Benchmark]]:
    found: dict[str, list[Benchmark]] = defaultdict(list)
    for b in report["benchmarks"]:
        found[b["group"]].append(b)
    return found


def _contender(b: Benchmark) -> str:
    """`test_per_leaf[...]` is `per leaf`; in a group that grows, where it stands."""
    at = b["extra_info"].get("at")
    return str(at) if at is not None else b["name"].partition("[")[0].removeprefix("test_").replace("_", " ")


def main(file: Path) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    text, page = table(report), file.with_suffix(".md")
    page.write_text(text, encoding="utf-8")
    written = [page, *plot(report, file.with_suffix(".png"))]
    print(text)
    print(f"written to {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
