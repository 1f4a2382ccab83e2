"""The sections of a report that take the seed as the unit: over tasks, paired by seed, and at equal KL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignbench.analysis import contrasts
from alignbench.analysis.contrasts import BEST_REWARD, KL, Family
from alignbench.analysis.modes import modes_frame
from alignbench.comparison.results import Results
from alignbench.frontier.front import Front
from alignbench.reports.formatting import SIGNIFICANT, counted, heading
from alignbench.reports.plots import reward_kl
from alignbench.reports.style import objective_of


@dataclass(frozen=True)
class Section:
    """A table of a report.

    Attributes:
        title: its heading.
        note: what its numbers are, in one sentence.
        names: headings of the columns that name a row.
        metrics: metric -> heading of its column.
        rows: the names of each row, and its entries: metric -> row of a frame of `analysis.contrasts`.
    """

    title: str
    note: str
    names: list[str]
    metrics: dict[str, str]
    rows: list[tuple[list[str], dict[str, dict[Any, Any]]]]

    @property
    def common_n(self) -> str:
        """The n of all entries that have one, in words; empty where they differ, or have an n of all runs."""
        entries = [entry for _, of_row in self.rows for entry in of_row.values() if entry["n"]]
        if any("runs" in entry for entry in entries) or len({entry["n"] for entry in entries}) != 1:
            return ""
        return counted(entries[0]["n"], "seeds")


@dataclass
class FamilyReport:
    """What a report says about a family of setups.

    Attributes:
        name: the family's.
        sections: the tables that apply.
        details: long tables that a page folds away, the masses of modes.
        frames: everything as frames, by the names of their files.
        values, equal_kl: what the reward-KL frontier is drawn from.
        titles: setup -> its task.
    """

    name: str
    sections: list[Section] = field(default_factory=list)
    details: list[Section] = field(default_factory=list)
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    values: pd.DataFrame = field(default_factory=pd.DataFrame)
    equal_kl: pd.DataFrame = field(default_factory=pd.DataFrame)
    titles: dict[str, str] = field(default_factory=dict)

    def frontier(self, fronts: Mapping[str, Front | None]) -> Figure | None:
        """The reward-KL frontier, where the KL, the reward and its bound are known exactly.

        Args:
            fronts: setup -> its front, if there is one.
        """
        if not set(reward_kl.METRICS) <= set(self.values.columns):
            return None
        return reward_kl.reward_kl_frontier(self.values, self.equal_kl, self.titles, fronts)


def family_report(results: Results, family: Family) -> FamilyReport:
    """Everything that applies to a family of setups."""
    records = results.of(family.setups[0])[0].result.metrics
    report = FamilyReport(family.name)
    report.titles = {setup: results.of(setup)[0].result.run.task for setup in family.setups}
    report.values = contrasts.values_frame(results, family, reward_kl.METRICS)
    table = contrasts.over_tasks(report.values, family.metrics)
    several = len(family.setups) > 1
    paired = f"{'means over the tasks, ' if several else ''}paired by seed; * marks p < {SIGNIFICANT} by Student's t test"
    holm = f"{paired}, Holm-corrected for the rows of the table"
    headings = {name: heading(name, records[name]) for name in family.metrics}

    def add(name: str, frame: pd.DataFrame, title: str, note: str, keys: dict[str, str]) -> None:
        report.frames[name] = frame if frame.empty else frame.assign(family=family.name)
        if len(frame) and frame["n"].max() > 1:
            report.sections.append(Section(title, note, list(keys), headings, _rows(frame, list(keys.values()))))

    if several:
        test = f"p < {SIGNIFICANT} by Student's t test over seeds, Holm-corrected for the rows of the table"
        note = f"Means over the tasks; * marks a difference to the base model with {test}."
        frame = contrasts.means_frame(table, family.metrics)
        add("over_tasks", frame, f"Means over {len(family.setups)} tasks", note, {"method": "cell"})
    frame = contrasts.sampler_frame(table, family.metrics)
    keys = {"objective": "cell", "first": "first", "second": "second"}
    add("samplers", frame, "Differences between samplers", f"The second minus the first, {holm}.", keys)
    frame = contrasts.method_frame(table, family.metrics)
    first = objective_of(str(frame["first"].iloc[0])) if len(frame) else ""
    add("methods", frame, f"Differences to {first}", f"Minus {first} with the same sampler, {holm}.", {"method": "cell"})
    _add_equal_kl(results, family, report, headings, f"Minus {first} with the same sampler, {holm}.")
    _add_modes(results, family, report)
    return report


def _add_equal_kl(results: Results, family: Family, report: FamilyReport, headings: dict[str, str], note: str) -> None:
    """Adds tables for each KL level that a training was seen at."""
    at = contrasts.at_kl(results, family, report.values)
    report.equal_kl = contrasts.equal_kl_frame(at)
    differences = contrasts.equal_kl_method_frame(at, family.metrics)
    for name, frame in (("equal_kl", report.equal_kl), ("equal_kl_methods", differences)):
        if len(frame):
            report.frames[name] = frame.assign(family=family.name)
    metrics = {name: text for name, text in headings.items() if name not in (KL, BEST_REWARD)}
    tables: Any = report.equal_kl.groupby(["setup", "kl"], sort=False) if len(report.equal_kl) else ()
    for (setup, level), frame in tables:
        title = f"Where the KL to the base model first reaches {level:g}, {report.titles[setup]}"
        seen = "Means over the seeds that were measured near this KL, interpolated between snapshots."
        report.sections.append(Section(title, seen, ["method"], metrics, _rows(frame, ["cell"])))
    by_level: Any = differences.groupby("kl", sort=False) if len(differences) else ()
    for level, frame in by_level:
        title = f"Differences where the KL first reaches {level:g}"
        report.sections.append(Section(title, note, ["method"], metrics, _rows(frame, ["cell"])))


def _add_modes(results: Results, family: Family, report: FamilyReport) -> None:
    """Adds the mass of each mode for each setup whose backbone knows its distribution."""
    frames = {setup: modes_frame(results, setup) for setup in family.setups}
    for setup, frame in frames.items():
        if frame.empty:
            continue
        by_mode = frame.assign(metric=frame["mode"].astype(str))
        modes = {name: f"mode {name}" for name in dict.fromkeys(by_mode["metric"])}
        note = "Mass of each mode in what the model draws for the first evaluation prompt, mean over seeds."
        report.details.append(
            Section(f"Mass of each mode, {report.titles[setup]}", note, ["model"], modes, _rows(by_mode, ["cell"]))
        )
    parts = [frame.assign(setup=setup, family=family.name) for setup, frame in frames.items() if len(frame)]
    if parts:
        report.frames["modes"] = pd.concat(parts, ignore_index=True)


def _rows(frame: pd.DataFrame, keys: Sequence[str]) -> list[tuple[list[str], dict[str, dict[Any, Any]]]]:
    """The names and the entries of each row of a section, from a frame with a row per metric."""
    rows: dict[tuple[str, ...], dict[str, dict[Any, Any]]] = {}
    for entry in frame.to_dict("records"):
        rows.setdefault(tuple(str(entry[key]) for key in keys), {})[str(entry["metric"])] = entry
    return [(list(names), entries) for names, entries in rows.items()]


def joined_frames(reports: Sequence[FamilyReport]) -> dict[str, pd.DataFrame]:
    """The frames of all families, by the names of their files."""
    return joined([report.frames for report in reports])


def joined(several: Sequence[Mapping[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """Frames of the same name one below another; empty ones are left out."""
    names = dict.fromkeys(name for frames in several for name in frames)
    parts = {name: [frames[name] for frames in several if name in frames and len(frames[name])] for name in names}
    return {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items() if frames}
