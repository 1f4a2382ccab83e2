"""The settings that each method of a setup was trained with."""

from collections.abc import Mapping
from typing import Any

from alignbench.comparison.reading import KEYS_OUTSIDE_METHOD_IDENTITY
from alignbench.comparison.results import Results
from alignbench.reports.formatting import listed
from alignbench.reports.text_table import Cell, TextTable, name

PLUGINS = ("objective", "sampler")


def settings_table(results: Results, setup: str) -> TextTable:
    """A row for each method: the settings of its objective and sampler, and the other keys in which methods differ."""
    configs = {run.cell: run.result.config for run in reversed(results.of(setup))}
    configs = {cell: configs[cell] for cell in dict.fromkeys(run.cell for run in results.of(setup))}
    others = {cell: _others(config) for cell, config in configs.items()}
    keys = dict.fromkeys(key for each in others.values() for key in each)
    differing = [key for key in keys if len({repr(each.get(key)) for each in others.values()}) > 1]
    head = ["method", *PLUGINS, *(["other settings that differ"] if differing else [])]
    rows = []
    for cell, config in configs.items():
        plugins = [_text(_settings(config.get(kind))) for kind in PLUGINS]
        rest = [_text({key: others[cell].get(key) for key in differing})] if differing else []
        rows.append([name(cell), *(Cell(text, text) for text in (*plugins, *rest))])
    note = (
        "The settings that were recorded for each method's objective and sampler; runs of older versions recorded those alone "
        "that differ from the defaults. All other settings are in the config.yaml of each run."
    )
    return TextTable("Settings of the methods", note, head, rows, folded=True)


def _settings(plugin: Any) -> dict[str, Any]:
    return {key: value for key, value in plugin.items() if key not in ("name", "label")} if isinstance(plugin, Mapping) else {}


def _others(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in {*KEYS_OUTSIDE_METHOD_IDENTITY, *PLUGINS}}


def _text(values: Mapping[str, Any]) -> str:
    return listed(values) if values else "defaults"
