"""Sweeps: a method under several values of a setting, each a method of its own, which reports join to one curve.

A sweep has a key and its values. The key is `NAME.KEY` for one compared objective or sampler, where KEY is one of its settings
or a key of the configuration (`tmpo.beta`, `tmpo.optimizer.lr`); or a key of the configuration, for all methods
(`optimizer.lr`, `sampler.steps`, `reward.NAME` for the weight of one of several rewards).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from alignbench.config.run_config import RunConfig


def value_text(value: Any) -> str:
    """A swept value as labels show it: `0.0001` however it was written, `null`, `true`, `1+2` for a list."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        short = f"{value:g}"
        return short if float(short) == value else repr(float(value) if isinstance(value, float) else value)
    return "+".join(map(value_text, value)) if isinstance(value, list | tuple) else str(value)


def point_text(swept: Mapping[str, Any], separator: str = ", ") -> str:
    """The values of a point with the last part of each key, or the whole key where two end alike: `beta=0.5, lr=0.0001`."""
    short = {key: key.rpartition(".")[2] for key in swept}
    names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    return separator.join(f"{names[key]}={value_text(value)}" for key, value in swept.items())


def point_value(swept: Mapping[str, Any]) -> float:
    """The swept value of a point with a single number; NaN for other points."""
    values = list(swept.values())
    number = values[0] if len(values) == 1 and not isinstance(values[0], bool) else None
    return float(number) if isinstance(number, int | float) else float("nan")


class Pair(NamedTuple):
    """An objective and a sampler: for each the compared label, and the name of the plug-in that it stands for."""

    objective: tuple[str, str]
    sampler: tuple[str, str]


class Meaning(NamedTuple):
    """What a sweep's key means for a pair.

    Attributes:
        key: the dotted key of the configuration, such as `objective.beta` for `tmpo.beta`.
        side: whose label shows the value: `objective` or `sampler`.
    """

    key: str
    side: str


def meaning(key: str, pair: Pair) -> Meaning | None:
    """What a sweep's key means for a pair; None if it is about others."""
    if is_config_key(key):
        return Meaning(key, "sampler" if key.startswith("sampler.") else "objective")
    for side, names in (("objective", pair.objective), ("sampler", pair.sampler)):
        for name in names:
            rest = key.removeprefix(f"{name}.")
            if rest != key:
                return Meaning(rest if is_config_key(rest) else f"{side}.{rest}", side)
    return None


def keys_about(sweep: Iterable[str], pair: Pair) -> list[str]:
    """The keys of sweeps that are about a pair; one by its label takes the place of one by the name behind the label."""
    meanings = {key: means for key in sweep if (means := meaning(key, pair))}
    by_label = {means.key for key, means in meanings.items() if _is_by_label(key, pair)}
    return [key for key, means in meanings.items() if means.key not in by_label or _is_by_label(key, pair)]


def _is_by_label(key: str, pair: Pair) -> bool:
    return any(key.startswith(f"{label}.") and label != name for label, name in pair)


def is_config_key(key: str) -> bool:
    """Whether a dotted key begins with a key of the configuration."""
    return key.partition(".")[0] in RunConfig.model_fields


def points(sweep: Mapping[str, Sequence[Any]], pair: Pair) -> list[dict[str, Any]]:
    """The points of all sweeps that are about a pair, key -> value; several multiply. One empty point without a sweep."""
    own = {key: sweep[key] for key in keys_about(sweep, pair)}
    return [dict(zip(own, values, strict=True)) for values in product(*own.values())]


def overlay(swept: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
    """The keys of the configuration that a point sets, nested."""
    meanings = {key: means.key for key in swept if (means := meaning(key, pair))}
    nested: dict[str, Any] = {}
    for key, dotted in meanings.items():
        *above, last = dotted.split(".")
        level = nested
        for part in above:
            level = level.setdefault(part, {})
        level[last] = swept[key]
    return nested


def labels(swept: Mapping[str, Any], pair: Pair) -> tuple[str, str]:
    """The labels of objective and sampler at a point, with the values that each of them shows, such as `tmpo(beta=0.5)`."""

    def with_values(side: str, label: str) -> str:
        own = {key: value for key, value in swept.items() if (means := meaning(key, pair)) and means.side == side}
        if not own:
            return label
        name, point = re.sub(r"[^\w.+-]", "_", label), re.sub(r"[^\w.+=,-]", "_", point_text(own, ","))
        return f"{name}({point})"

    (objective, _), (sampler, _) = pair
    return with_values("objective", objective), with_values("sampler", sampler)
