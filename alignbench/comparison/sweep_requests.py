"""Sweeps as a user asks for them: texts of the command line or a mapping in YAML, with every key and value checked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from alignbench import registry
from alignbench.comparison.grid import Method
from alignbench.comparison.reading import KEYS_OUTSIDE_METHOD_IDENTITY
from alignbench.comparison.sweeps import Pair, keys_about, meaning, value_text
from alignbench.config.run_config import PLUGINS, Plugin, RunConfig
from alignbench.errors import UserError
from alignbench.files.yaml_files import parse, to_yaml
from alignbench.objective import Objective, Strength
from alignbench.sampler import Sampler

INSTEAD = {
    "seed": "--seeds takes several",
    "task": "--tasks takes several",
    "objective": "--objectives takes several",
    "sampler": "--samplers takes several",
    "backbone": "a comparison has one backbone, or one for each part",
    "iterations": "every method gets the same budget",
    "budget": "every method gets the same budget",
    "evaluation": "every method is evaluated alike",
}
"""Keys of the configuration that cannot be swept -> what to do instead, or why."""
CANNOT_VARY = (KEYS_OUTSIDE_METHOD_IDENTITY - {"backbone"}) | {"preset"}
"""Keys in which two methods of a comparison cannot differ, with all keys below them."""


def parse_sweeps(texts: Iterable[str]) -> dict[str, Any]:
    """Reads `KEY=VALUE,VALUE,...`, or the name of an objective alone, from the command line.

    Returns:
        Key -> its values, null for a name alone.

    Raises:
        UserError: a text has no key, a key is there twice, or the values are not a YAML list without its brackets.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not key:
            raise UserError(f"--sweep takes KEY=VALUE,VALUE,... or the name of an objective, got {text!r}")
        if key in found:
            raise UserError(f"--sweep {key} is there twice; give all its values at once, as {key}=VALUE,VALUE,...")
        try:
            found[key] = parse(f"[{values}]") if equals else None
        except ValueError as error:
            why = str(error).removeprefix("line 1: ")
            raise UserError(f"--sweep {key}: {values!r} are not YAML values with commas: {why}") from None
    return found


def flattened(sweep: Mapping[str, Any], above: str = "") -> dict[str, list[Any] | None]:
    """The sweeps of a YAML mapping with dotted keys: `tmpo: {beta: [1, 2]}` is `tmpo.beta: [1, 2]`.

    Raises:
        UserError: a key's values are not a list.
    """
    found: dict[str, list[Any] | None] = {}
    for name, values in sweep.items():
        key = f"{above}{name}"
        if isinstance(values, Mapping):
            found |= flattened(values, f"{key}.")
        elif values is None or isinstance(values, list | tuple):
            found[key] = None if values is None else list(values)
        else:
            raise UserError(f"sweep {key} takes a list of values, got {values!r}")
    return found


def resolved(sweep: Mapping[str, list[Any] | None], pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """The sweeps with their values, where a name alone stands for the strength that the objective declares.

    Args:
        pairs: all objectives and samplers that are compared.

    Raises:
        UserError: a key has no values, or one twice, or means nothing for these pairs or the same as another key.
    """
    found: dict[str, list[Any]] = {}
    for key, values in sweep.items():
        strength = None if values is not None else _strength(key, pairs)
        name, given = (key, values or []) if strength is None else (f"{key}.{strength.setting}", list(strength.values))
        if name in found:
            raise UserError(f"sweep {name} is there twice; leave one of them out")
        _check_key(name, pairs)
        _check_values(name, given)
        found[name] = given
    _refuse_one_setting_twice(found, pairs)
    return found


def texts(sweep: Mapping[str, Sequence[Any]]) -> list[str]:
    """The texts from which `parse_sweeps` reads the same sweeps."""

    def text(value: Any) -> str:
        return to_yaml([value], default_flow_style=True, width=float("inf")).strip()[1:-1]

    return [f"{key}={','.join(map(text, values))}" for key, values in sweep.items()]


@contextmanager
def naming_the_point(method: Method) -> Iterator[None]:
    """Begins the message of a UserError with the values of sweeps that the method has."""
    try:
        yield
    except UserError as error:
        if not method.swept:
            raise
        values = ", ".join(f"{key}={value_text(value)}" for key, value in method.swept.items())
        raise UserError(f"sweep {values}: {error}") from None


def refuse_ineffective(method: Method, objective: Objective) -> None:
    """Raises UserError where a swept setting of the objective cannot act in this configuration, so that its values are equal.

    Args:
        objective: the method's.
    """
    if not objective.on_paths and any(key.partition(".")[0] in ("likelihood", "elbo") for key in method.swept):
        raise UserError(f"sweep likelihood has no effect on {method.base}, which does not ask for log-probabilities of paths")
    reasons = objective.ineffective_settings(method.config.updates_per_rollout)
    for key in method.swept:
        means = meaning(key, method.pair)
        setting = means.key.removeprefix("objective.") if means else ""
        if setting in reasons:
            raise UserError(f"sweep {key}: {setting} has no effect on {method.base}, since {reasons[setting]}")


def _strength(name: str, pairs: Sequence[Pair]) -> Strength:
    """The strength that a compared objective declares."""
    plugins = {label: pair.objective[1] for pair in pairs for label in pair.objective}
    if name not in plugins:
        if name in registry.names("objectives"):
            raise UserError(f"sweep {name}: {name} is not compared; add it to the objectives")
        hint = _did_you_mean(name, plugins) or f"; give the values as {name}=VALUE,VALUE,..."
        raise UserError(f"sweep {name}: only a compared objective can be swept without values{hint}")
    cls = registry.find("objectives", plugins[name], Objective)
    strength: Strength | None = cls.strength
    if strength is None:
        raise UserError(
            f"sweep {name}: {plugins[name]} declares no strength; sweep one of its settings, as {name}.KEY=VALUE,..."
        )
    return strength


def _check_key(key: str, pairs: Sequence[Pair]) -> None:
    meanings = {pair: means for pair in pairs if (means := meaning(key, pair))}
    if not meanings:
        for kind in ("objectives", "samplers"):
            for name in registry.names(kind):
                if key.startswith(f"{name}."):
                    raise UserError(f"sweep {key}: {name} is not compared; add it to the {kind}")
        near = _did_you_mean(key, _keys(pairs)) or "; `alignbench show run` lists the keys of the configuration"
        raise UserError(f"there is no key {key!r} to sweep{near}")
    for pair, means in meanings.items():
        first, _, rest = means.key.partition(".")
        if first in CANNOT_VARY or (first in PLUGINS and rest in ("", "name", "label")):
            raise UserError(f"sweep {key}: {first} cannot be swept{_reason(first)}")
        if first in ("objective", "sampler") and key != means.key:
            _check_setting(key, first, getattr(pair, first)[1], rest)


def _reason(key: str) -> str:
    return f"; {INSTEAD[key]}" if key in INSTEAD else ", since it does not change what a method is"


def _check_setting(key: str, kind: str, name: str, setting: str) -> None:
    settings = _plugin_settings(kind, name)
    if setting.partition(".")[0] not in settings:
        near = _did_you_mean(setting, settings) or f"; `alignbench show {kind} {name}` lists them"
        raise UserError(f"sweep {key}: {kind} {name} has no setting {setting!r}{near}")


def _check_values(key: str, values: list[Any]) -> None:
    if not values:
        raise UserError(f"sweep {key} has no values; give them as {key}=VALUE,VALUE,...")
    for place, value in enumerate(values):
        if isinstance(value, Mapping):
            raise UserError(f"sweep {key}: a value is a number, a text, true, false, null or a list of these, got {value!r}")
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values[:place]):
            raise UserError(f"sweep {key} has {value_text(value)} twice; leave one of them out")


def _refuse_one_setting_twice(sweep: Mapping[str, list[Any]], pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        by_setting: dict[str, str] = {}
        for key in keys_about(sweep, pair):
            means = meaning(key, pair)
            if means and by_setting.setdefault(means.key, key) != key:
                first = by_setting[means.key]
                raise UserError(f"sweeps {first} and {key} both set {means.key} of {pair.objective[0]}; leave one of them out")


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    """The hint with keys that end alike, such as `optimizer.lr` for `lr`, else with similar ones; empty where there is none."""
    known = sorted(set(known))
    near = [other for other in known if other.rpartition(".")[2] == key] or get_close_matches(key, known, n=3, cutoff=0.6)
    return "; did you mean " + " or ".join(map(repr, near[:3])) + "?" if near else ""


def _keys(pairs: Sequence[Pair]) -> Iterator[str]:
    """The keys that can be swept: those of the configuration, and the settings of the compared plug-ins behind their names."""
    for name, field in RunConfig.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel) and not issubclass(kind, Plugin)]
        if name not in CANNOT_VARY:
            yield from (f"{name}.{key}" for kind in inner for key in kind.model_fields)
            yield from () if inner or name in PLUGINS else (name,)
    plugins = {(kind, *getattr(pair, kind)) for pair in pairs for kind in ("objective", "sampler")}
    for kind, label, name in plugins:
        yield from (f"{label}.{key}" for key in _plugin_settings(kind, name))


def _plugin_settings(kind: str, name: str) -> list[str]:
    base: type[Any] = Objective if kind == "objective" else Sampler
    return list(registry.find(f"{kind}s", name, base).Settings.model_fields)
