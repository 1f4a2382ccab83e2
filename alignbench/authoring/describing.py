"""What `show` prints about a plug-in or about a run's configuration: a description, the source, and every setting.

Everything is read from the code. The module's docstring has the equation and the source; the fields of `Settings` have types,
defaults and meanings.
"""

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alignbench import registry
from alignbench.backbone import Backbone
from alignbench.config.run_config import Plugin, RunConfig
from alignbench.errors import UserError, did_you_mean
from alignbench.objective import Objective
from alignbench.sampler import Sampler
from alignbench.scorer import Metric

KINDS: dict[str, tuple[str, type]] = {
    "objective": ("objectives", Objective),
    "sampler": ("samplers", Sampler),
    "eval": ("evals", Metric),
    "backbone": ("backbones", Backbone),
}
"""For each kind, its name in the registry and its base class."""
RUN = "run"


class Setting(BaseModel):
    """A setting of a plug-in, or a key of a run's configuration."""

    name: str
    """The name, with dots for nested keys, as `--set` takes it after the plug-in's own key."""
    type: str
    default: Any = None
    required: bool = False
    meaning: str


class DeclaredStrength(BaseModel):
    """The setting of an objective that trades reward for closeness to the base model; `compare --sweep NAME` sweeps it."""

    setting: str
    values: list[float]
    """From the value that keeps the policy closest to the base model to the one that lets it go furthest."""


class Description(BaseModel):
    """What `show` prints. With `--json` it prints this document."""

    kind: str
    name: str
    summary: str
    text: str
    """The rest of the module's docstring: equation, notation, source."""
    settings: list[Setting]
    strength: DeclaredStrength | None = None
    """The strength that an objective declares; null for other plug-ins."""


def describe(kind: str, name: str | None = None) -> Description:
    """Describes a plug-in, or the configuration of a run, with all settings.

    Args:
        kind: one of `KINDS`, in the singular or plural, or `run`.
        name: name of the plug-in; None for `run`.

    Raises:
        UserError: the kind or the name is unknown, or the name is missing or not expected.
    """
    one = kind.removesuffix("s")
    if one == RUN:
        if name is not None:
            raise UserError("`show run` shows the keys of a run's configuration; it takes no name")
        summary = "the configuration of a run"
        text = (
            "These keys can be given with --config and --set. The settings of a plug-in follow its key, for instance "
            "objective.beta or sampler.steps."
        )
        return Description(kind=RUN, name=RUN, summary=summary, text=text, settings=list(_settings(RunConfig)))
    if one not in KINDS:
        raise UserError(f"unknown kind {kind!r}{did_you_mean(one, [*KINDS, RUN])}")
    where, base = KINDS[one]
    if name is None:
        raise UserError(f"`show {one}` needs a name: {', '.join(registry.names(where))}")
    plugin = registry.find(where, name, base)
    summary, _, text = cleandoc(sys.modules[plugin.__module__].__doc__ or plugin.__doc__ or name).partition("\n")
    return Description(
        kind=one,
        name=name,
        summary=summary.removeprefix(f"{name}: "),
        text=text.strip("\n"),
        settings=list(_settings(plugin.Settings)),
        strength=_strength(plugin) if one == "objective" else None,
    )


def _strength(objective: type[Objective]) -> DeclaredStrength | None:
    declared = objective.strength
    return DeclaredStrength(setting=declared.setting, values=list(declared.values)) if declared else None


def _settings(model: type[BaseModel], above: str = "") -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        nested = _settings(inner, f"{name}.") if inner not in (None, Plugin) and not above else ()
        if nested and field.default is not None:
            yield from nested
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        yield Setting(
            name=above + name,
            type=_type_of(field),
            default=None if default is PydanticUndefined else _plain(default),
            required=field.is_required(),
            meaning=" ".join((field.description or "").split()),
        )
        yield from nested


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Plugin):
        return value.name
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _type_of(field: FieldInfo) -> str:
    """The type in words, such as `float above 0, or null` or `one of mean, sum`."""
    bounds = []
    for bound in field.metadata:
        match bound:
            case Gt():
                bounds.append(f"above {bound.gt:g}")
            case Ge():
                bounds.append(f"at least {bound.ge:g}")
            case Lt():
                bounds.append(f"below {bound.lt:g}")
            case Le():
                bounds.append(f"at most {bound.le:g}")
    kinds = _kinds(field.annotation)
    text = " or ".join(kind for kind in kinds if kind != "null")
    text = " ".join([text, " and ".join(bounds)]).strip()
    return f"{text}, or null" if "null" in kinds else text


_WORDS = {float: "float", int: "whole number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def _kinds(annotation: Any) -> list[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (Union, UnionType):
        return [kind for each in inner for kind in _kinds(each)]
    if origin is Literal:
        return [f"one of {', '.join(map(str, inner))}"]
    if origin in (list, tuple):
        return [
            "list of " + " or ".join(dict.fromkeys(kind for each in inner if each is not Ellipsis for kind in _kinds(each)))
        ]
    if annotation is Plugin:
        return ["name"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["keys and values"]
    return [_WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))]
