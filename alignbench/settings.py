"""The base of every settings class: strict, so that a misspelt key is an error and never ignored."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Options of a plug-in or a part of a run; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
