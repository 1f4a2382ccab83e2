"""The base of every settings class: strict, so that a misspelt key is an error and never ignored."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Options of a plug-in or a part of a run; an unknown key is refused, and so is a number that is NaN or infinite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def first_problem(error: ValidationError, whole: str) -> str:
    """`place: what is wrong` of the first thing that validation found in received data.

    Args:
        whole: what the place is called where it is the data as a whole.
    """
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or whole
    return f"{where}: {problem['msg'].lower()}"
