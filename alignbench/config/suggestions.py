"""Hints for a misspelt or misplaced key of a run's configuration: the whole path of the setting that was meant."""

from collections.abc import Mapping

from pydantic import BaseModel

from alignbench import registry
from alignbench.backbones import families
from alignbench.errors import UnknownKeyError, UserError
from alignbench.settings import paths_of, suggested


def with_whole_path(error: UnknownKeyError, config: type[BaseModel], plugins: Mapping[str, str]) -> UserError:
    """Makes the error with the whole path of a setting of that name, or with the plug-ins that have it, if there are any.

    Args:
        error: the error of the unknown key.
        config: the class of a run's configuration.
        plugins: objective, sampler and backbone -> name.
    """
    paths = _whole_paths(error.key, config, plugins)
    if paths:
        return UserError(error.without_hint + suggested(paths))
    for kind in ("sampler", "objective"):
        having = [name for name in registry.names(f"{kind}s") if error.key in registry.setting_names(f"{kind}s", name)]
        if having:
            return UserError(f"{error.without_hint}; {kind}.{error.key} is a setting of {', '.join(having)}")
    return error


def _whole_paths(key: str, config: type[BaseModel], plugins: Mapping[str, str]) -> list[str]:
    """The dotted paths of the settings called `key`: keys of the configuration, and settings of its plug-ins."""
    own = [key] if key in config.model_fields else []
    names = {kind: families.opener(name) if kind == "backbone" else name for kind, name in plugins.items()}
    of_plugins = [f"{kind}.{key}" for kind, name in names.items() if key in registry.setting_names(f"{kind}s", name)]
    return [*own, *paths_of(config, key), *of_plugins]
