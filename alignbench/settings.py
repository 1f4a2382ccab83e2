"""The base of every settings class: strict, so that a misspelt key is an error and never ignored."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Options of a plug-in or a part of a run; an unknown key is refused, and so is a number that is NaN or infinite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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
