"""The base class of all settings. It is strict: a misspelt key is an error and is never ignored."""

import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from alignbench.errors import UnknownKeyError, UserError, did_you_mean, holds_secret, nearest

Model = TypeVar("Model", bound=BaseModel)

_TYPES_WITHOUT_BOOL = (int, float, str, bytes, Path, type(None))


class Settings(BaseModel):
    """Options of a plug-in or of a part of a run. Unknown keys and numbers that are NaN or infinite are refused.

    A setting that is a text accepts a number as it was written. true and false are accepted neither as numbers nor as texts,
    except in `label`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_not_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false where no bool is meant; pydantic would take true for 1."""
        name = str(info.field_name)
        if _contains_bool(value) and not _field_accepts_bool(cls, name):
            if name == "label":
                return str(value).lower()
            raise ValueError("true and false are not possible values here; write a number, or a text in quotes")
        return value


def _contains_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_contains_bool, value.values()))
    return any(map(_contains_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


@cache
def _field_accepts_bool(model: type[BaseModel], name: str) -> bool:
    return _accepts_bool(model.model_fields[name].annotation)


def _accepts_bool(annotation: Any) -> bool:
    """Tells whether a value of this type can be a bool or contain one."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _accepts_bool(inner[0])
    if origin is Literal:
        return any(isinstance(value, bool) for value in inner)
    if origin in (Union, types.UnionType) or (isinstance(origin, type) and issubclass(origin, list | tuple | set | frozenset)):
        return any(_accepts_bool(each) for each in inner if each is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _accepts_bool(inner[1])
    return annotation not in _TYPES_WITHOUT_BOOL


def _service_url(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or half an IPv6 address
        is_http = False
    # The error must not show the value, which may contain a password.
    if "@" in value or "?" in value or "#" in value:
        raise PydanticCustomError(
            "url",
            "a service's URL consists of scheme, host, port and path only; a password or token comes from the variable "
            "ALIGNBENCH_SCORER_TOKEN or from a token file (docs/configuration.md)",
        )
    if not is_http or not value.isprintable():
        raise PydanticCustomError("url", "a service's URL is like http://127.0.0.1:8765, or begins with https://")
    return value


ServiceURL = Annotated[str, BeforeValidator(_service_url)]
"""The URL of a service. It contains no secret, so it can be written into records and messages."""


def checked_device(name: str) -> str:
    """Returns the name if it is a device's; raises ValueError otherwise."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise ValueError("a device is auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(checked_device)]
"""A device's name. Whether the device exists is checked where it is used (`alignbench.backbone.device_named`)."""


def first_problem(error: ValidationError, whole: str) -> str:
    """Describes the first error that validation found in received data, as `place: what is wrong`.

    Args:
        error: the error of the validation.
        whole: what the place is called if it is the data as a whole.
    """
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or whole
    return f"{where}: {problem['msg'].lower()}"


def validate(model: type[Model], data: Mapping[str, Any], *, where: str) -> Model:
    """Builds a settings object from data.

    Args:
        model: its class.
        data: key -> value.
        where: what the data belong to; error messages begin with it.

    Raises:
        UserError: one sentence that names the key, what is wrong, and for an unknown key the nearest valid one.
    """
    for key, why in _unstorable(data):
        raise UserError(f"{where}: {key}: {why}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "extra_forbidden":
            raise _unknown_key(model, [str(part) for part in problem["loc"]], where) from None
        raise UserError(f"{where}: {_first_problem(error)}") from None


def _unstorable(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Finds values that cannot be a setting, because torch or a record could not hold them: dotted key and reason."""
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        yield key, "a whole number must fit into 64 bits"
    elif isinstance(data, bytes):
        yield key, "bytes cannot be a setting"
    elif isinstance(data, float) and not math.isfinite(data):
        yield key, f"input should be a finite number, got {data}"
    elif isinstance(data, str) and holds_secret(data):
        remedy = "take it out; a scorer's token comes from ALIGNBENCH_SCORER_TOKEN or scorer_token_file (docs/configuration.md)"
        yield key, f"a password or token in a URL would be written into every record; {remedy}"
    elif isinstance(data, Mapping | list | tuple):
        for inner, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _unstorable(value, f"{key}.{inner}" if key else str(inner))


def _unknown_key(model: type[BaseModel], path: list[str], where: str) -> UnknownKeyError:
    """The error of a key that the model does not have; it suggests keys of that name elsewhere, and then similar ones here."""
    wrong, here = path[-1], _fields_at(model, path[:-1])
    elsewhere = paths_of(model, wrong)
    hint = suggested([*elsewhere, *nearest(wrong, here)]) if elsewhere else did_you_mean(wrong, here)
    return UnknownKeyError(f"{where}: there is no key {'.'.join(path)!r}", wrong, hint)


def suggested(paths: Sequence[str]) -> str:
    """The hint `; did you mean 'optimizer.lr'?` for the end of a message; empty where there is no path."""
    return f"; did you mean {' or '.join(map(repr, paths))}?" if paths else ""


def paths_of(model: type[BaseModel], name: str) -> list[str]:
    """The dotted paths of the keys below the top level of a model that have this name."""
    inner = {field: _fields_at(model, [field]) for field in model.model_fields}
    return [f"{field}.{name}" for field, names in inner.items() if name in names]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    shows_value = key and problem["type"] != "url" and not isinstance(problem["input"], Mapping)
    value = f", got {problem['input']!r}" if shows_value else ""
    return f"{key + ': ' if key else ''}{message[0].lower() + message[1:]}{value}{more}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
