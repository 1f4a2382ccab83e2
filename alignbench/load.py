"""Loads plug-ins by name: `load_sampler("dynamic_tree", kappa=0).plan(...)`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

from alignbench import registry
from alignbench.backbone import META, Backbone, device_named
from alignbench.backbones import families
from alignbench.config.run_config import PLUGINS, RunConfig
from alignbench.config.suggestions import with_whole_path
from alignbench.errors import UnknownKeyError, UserError
from alignbench.files.paths import local_path
from alignbench.objective import Objective, with_elbo
from alignbench.runtime import launch
from alignbench.sampler import Sampler
from alignbench.scorer import Metric, Scorer
from alignbench.settings import validate

_BASES: dict[str, type[Any]] = {"objective": Objective, "sampler": Sampler, "backbone": Backbone}


def load_objective(name: str, **settings: Any) -> Objective:
    """Loads an objective; raises UserError for an unknown name or setting."""
    return cast(Objective, registry.create("objectives", name, Objective, settings))


def load_configured_objective(config: RunConfig) -> Objective:
    """Loads the objective of a run's configuration, with the estimate of log-probabilities that the run asks for.

    Raises:
        UserError: an unknown name or setting, or an objective that needs the steps of a path where there are none.
    """
    with _whole_paths(config):
        objective = load_objective(config.objective.name, **config.objective.settings)
    return with_elbo(objective, config.elbo) if config.likelihood == "elbo" else objective


def load_sampler(name: str, **settings: Any) -> Sampler:
    """Loads a sampler; raises UserError for an unknown name, an unknown setting, or settings that do not fit together."""
    return cast(Sampler, registry.create("samplers", name, Sampler, settings))


def load_configured_sampler(config: RunConfig) -> Sampler:
    """Loads the sampler of a run's configuration; raises UserError as `load_sampler` does."""
    with _whole_paths(config):
        return load_sampler(config.sampler.name, **config.sampler.settings)


def load_scorer(name: str, **settings: Any) -> Scorer:
    """Loads a scorer, which gives one number for each image; raises UserError for an unknown name or setting."""
    return cast(Scorer, registry.create("evals", name, Scorer, settings))


def load_eval(name: str, **settings: Any) -> Metric:
    """Loads a scorer or a set metric; raises UserError for an unknown name or setting."""
    return cast(Metric, registry.create("evals", name, Metric, settings))


def load_backbone(name: str, **settings: Any) -> Backbone:
    """Loads the backbone of that name, or the local diffusers folder at that path.

    Raises:
        UserError: it is neither, the folder cannot be opened, or a setting is unknown.
    """
    path = {"path": str(local_path(name))} if families.is_folder(name) else {}
    return cast(Backbone, registry.create("backbones", families.opener(name), Backbone, {**path, **settings}))


def backbone_class(name: str) -> type[Backbone]:
    """The class that opens a backbone, which is not loaded; raises UserError for an unknown name or folder."""
    return registry.find("backbones", families.opener(name), Backbone)


def load_configured_backbone(config: RunConfig, *, device: str | None = None) -> Backbone:
    """Loads the backbone of a run's configuration, and sets the number of threads that it asks for.

    The weights of a new adapter are drawn with the configuration's seed.

    Args:
        config: the configuration.
        device: the device to use instead of the configuration's.

    Raises:
        UserError: the device is not there or cannot draw images, or the backbone cannot be loaded.
    """
    torch.set_num_threads(threads_of(config))
    torch.manual_seed(config.seed)
    settings = {"device": config.device, "guidance": config.guidance, **config.backbone.settings}
    if settings["device"] == META:
        raise UserError(f"device {META}: no image can be drawn on it; `run --dry-run` estimates what a model would need")
    device_named(str(settings["device"]))  # is checked even if another device takes its place
    with _whole_paths(config):
        return load_backbone(config.backbone.name, **(settings | ({"device": device} if device else {})))


@contextmanager
def _whole_paths(config: RunConfig) -> Iterator[None]:
    """Suggests the whole path of a key that a plug-in does not have, where the run's configuration has one of that name."""
    try:
        yield
    except UnknownKeyError as error:
        raise with_whole_path(error, RunConfig, {kind: getattr(config, kind).name for kind in PLUGINS}) from None


def every_setting(config: RunConfig) -> RunConfig:
    """The configuration with every setting of its objective, sampler and backbone, also those that have their defaults."""
    filled = {}
    for kind in PLUGINS:
        plugin = getattr(config, kind)
        settings = complete_settings(kind, {"name": plugin.name, **plugin.settings})
        filled[kind] = plugin.model_copy(update={"settings": {k: v for k, v in settings.items() if k != "name"}})
    return config.model_copy(update=filled)


def complete_settings(kind: str, plugin: Mapping[str, Any]) -> dict[str, Any]:
    """A plug-in's name with every setting of its class as plain data; what is given if the class or a value is not valid.

    The path of a backbone's folder, its device and its guidance are not filled in: the first is a place of this machine, and
    the others are keys of the run.

    Args:
        kind: objective, sampler or backbone.
        plugin: its `name`, perhaps a `label`, and settings.
    """
    given = {key: value for key, value in plugin.items() if key not in ("name", "label")}
    names = {key: plugin[key] for key in ("name", "label") if key in plugin}
    try:
        name = str(names["name"])
        found = families.opener(name) if kind == "backbone" else name
        cls = registry.find(f"{kind}s", found, _BASES[kind])
        path = {"path": str(local_path(name))} if kind == "backbone" and families.is_folder(name) else {}
        valid = validate(cls.Settings, {**path, **given}, where=name).model_dump(mode="json")
    except (KeyError, UserError):
        return dict(plugin)
    left_out = {key for key in ("path", "device", "guidance") if kind == "backbone" and key not in given}
    return names | {key: value for key, value in valid.items() if key not in left_out}


def opens_on_meta_device(config: RunConfig) -> bool:
    """Tells whether the configuration's backbone can be opened without weights, on the device `meta`."""
    return backbone_class(config.backbone.name).supports_meta_device


def threads_of(config: RunConfig, beside: int = 1) -> int:
    """Computes the number of CPU threads of a process: what the configuration asks for, or else `launch.threads`.

    Args:
        config: the configuration.
        beside: how many processes share the machine.
    """
    return config.threads or launch.threads(beside)
