"""The base of every settings class: strict, so that a misspelt key is an error and never ignored."""

import math
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from alignbench.errors import UserError, did_you_mean, holds_secret

Model = TypeVar("Model", bound=BaseModel)

_WITHOUT_TRUTH = (int, float, str, bytes, Path, type(None))


class Settings(BaseModel):
    """Options of a plug-in or a part of a run; an unknown key is refused, and so is a number that is NaN or infinite.

    A setting that is a text takes a number as it was written. true and false are neither numbers nor texts, except in `label`.
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
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        name = str(info.field_name)
        if _holds_truth(value) and not _takes_truth_at(cls, name):
            if name == "label":
                return str(value).lower()
            raise ValueError("true and false are no values here; write a number, or a text in quotes")
        return value


def _holds_truth(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_truth, value.values()))
    return any(map(_holds_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


@cache
def _takes_truth_at(model: type[BaseModel], name: str) -> bool:
    return _takes_truth(model.model_fields[name].annotation)


def _takes_truth(annotation: Any) -> bool:
    """Whether true or false can be, or be inside, a value of this type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes_truth(inner[0])
    if origin is Literal:
        return any(isinstance(value, bool) for value in inner)
    if origin in (Union, types.UnionType) or (isinstance(origin, type) and issubclass(origin, list | tuple | set | frozenset)):
        return any(_takes_truth(each) for each in inner if each is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _takes_truth(inner[1])
    return annotation not in _WITHOUT_TRUTH


def _service_url(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        fits = False
    # The error must not show what was given: it may hold a password.
    if "@" in value or "?" in value or "#" in value:
        raise PydanticCustomError(
            "url",
            "a service's URL is scheme, host, port and path alone; a password or token comes from the variable "
            "ALIGNBENCH_SCORER_TOKEN or from a token file (docs/configuration.md)",
        )
    if not fits or not value.isprintable():
        raise PydanticCustomError("url", "a service's URL is like http://127.0.0.1:8765, or begins with https://")
    return value


ServiceURL = Annotated[str, BeforeValidator(_service_url)]
"""Where a service listens; nothing secret is in it, so that it can stand in records and messages."""


def checked_device(name: str) -> str:
    """The name, if it is that of a device; raises ValueError otherwise."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise ValueError("a device is auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(checked_device)]
"""A device's name. Whether it is there is seen where it is used (`alignbench.backbone.device_named`)."""


def first_problem(error: ValidationError, whole: str) -> str:
    """`place: what is wrong` of the first thing that validation found in received data.

    Args:
        whole: what the place is called where it is the data as a whole.
    """
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or whole
    return f"{where}: {problem['msg'].lower()}"


def validate(model: type[Model], data: Mapping[str, Any], *, where: str) -> Model:
    """The model built from data.

    Raises:
        UserError: one sentence that names the key, what is wrong, and for an unknown key the nearest valid one.
    """
    for key, why in _unfit(data):
        raise UserError(f"{where}: {key}: {why}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(model, error)}") from None


def _unfit(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of what no setting can be, because neither torch nor a record could hold it, and why."""
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        yield key, "a whole number must fit into 64 bits"
    elif isinstance(data, bytes):
        yield key, "bytes are no setting"
    elif isinstance(data, float) and not math.isfinite(data):
        yield key, f"input should be a finite number, got {data}"
    elif isinstance(data, str) and holds_secret(data):
        instead = (
            "take it out; a scorer's token comes from ALIGNBENCH_SCORER_TOKEN or scorer_token_file (docs/configuration.md)"
        )
        yield key, f"a password or token in a URL would stand in every record; {instead}"
    elif isinstance(data, Mapping | list | tuple):
        for inner, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _unfit(value, f"{key}.{inner}" if key else str(inner))


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    path = [str(p) for p in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key!r}{did_you_mean(path[-1], _fields_at(model, path[:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    shown = key and problem["type"] != "url" and not isinstance(problem["input"], Mapping)
    given = f", got {problem['input']!r}" if shown else ""
    return f"{key + ': ' if key else ''}{message[0].lower() + message[1:]}{given}{more}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
