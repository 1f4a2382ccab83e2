"""The alarms of a setup's runs, grouped by method and by what they are about."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from alignbench.evaluation.alarm import about_dead_modes
from alignbench.figures.metric_names import axis_name
from alignbench.reports.formatting import some_of

NAMED = 2
"""Metrics that a short description names, at most."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class AlarmGroup(NamedTuple):
    """The alarms of one method.

    Attributes:
        cell: the method.
        runs, raised: how many runs it has, and how many of them raised an alarm.
        about: what the alarms are about, in a few words, the most frequent first.
        alarms: seeds and sentence of each alarm; sentences that differ in numbers alone are one, with those of the first seed.
    """

    cell: str
    runs: int
    raised: int
    about: str
    alarms: list[tuple[str, str]]


def grouped(alarms: Mapping[tuple[str, int], Sequence[str]]) -> list[AlarmGroup]:
    """A group for each method of which a run raised an alarm.

    Args:
        alarms: cell and seed -> the run's alarms.
    """
    groups = []
    for cell in dict.fromkeys(cell for cell, _ in alarms):
        of_cell = {seed: sentences for (name, seed), sentences in alarms.items() if name == cell}
        alike: dict[str, list[tuple[int, str]]] = {}
        for seed, sentences in of_cell.items():
            for sentence in sentences:
                alike.setdefault(NUMBER.sub("#", sentence), []).append((seed, sentence))
        raised = sum(map(bool, of_cell.values()))
        if raised:
            frequent = sorted(alike.values(), key=len, reverse=True)
            about = _about(found[0][1] for found in frequent)
            rows = [(", ".join(str(seed) for seed, _ in found), found[0][1]) for found in frequent]
            groups.append(AlarmGroup(cell, len(of_cell), raised, about, rows))
    return groups


def _about(sentences: Iterable[str]) -> str:
    """What alarms are about in a few words: `LGMD, Vendi score and 2 more got worse, OCR score fell`."""
    by_change: dict[str, list[str]] = {}
    for sentence in sentences:
        what, change = _what(sentence)
        if what not in (known := by_change.setdefault(change, [])):
            known.append(what)
    return ", ".join(f"{some_of(names, NAMED)} {change}".strip() for change, names in by_change.items())


def _what(sentence: str) -> tuple[str, str]:
    """What an alarm is about and what became of it; the sentence up to its first number where it has an unknown form."""
    fell = re.match(r"(\S+) rose by \S+ while (\S+) (?:went|fell)", sentence)
    if fell:
        return axis_name(fell[2]), "got worse"
    lost = re.match(r"(\S+) fell by ", sentence)
    if lost:
        return axis_name(lost[1]), "fell"
    if about_dead_modes(sentence):
        return "modes", "died"
    return NUMBER.split(sentence)[0].strip(" (,") or "other", ""
