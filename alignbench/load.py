"""Plug-ins by name: `load_sampler("dynamic_tree", kappa=0).plan(...)`."""

from typing import Any, cast

import torch

from alignbench import registry
from alignbench.backbone import META, Backbone, device_named
from alignbench.backbones import families
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.files.paths import local_path
from alignbench.objective import Objective
from alignbench.runtime import launch
from alignbench.sampler import Sampler
from alignbench.scorer import Metric, Scorer


def load_objective(name: str, **settings: Any) -> Objective:
    """The objective of that name; raises UserError for an unknown name or setting."""
    return cast(Objective, registry.create("objectives", name, Objective, settings))


def load_sampler(name: str, **settings: Any) -> Sampler:
    """The sampler of that name; raises UserError for an unknown name, setting or an impossible geometry."""
    return cast(Sampler, registry.create("samplers", name, Sampler, settings))


def load_scorer(name: str, **settings: Any) -> Scorer:
    """The scorer (one number for each image) of that name; raises UserError for an unknown name or setting."""
    return cast(Scorer, registry.create("evals", name, Scorer, settings))


def load_eval(name: str, **settings: Any) -> Metric:
    """The scorer or set metric of that name; raises UserError for an unknown name or setting."""
    return cast(Metric, registry.create("evals", name, Metric, settings))


def load_backbone(name: str, **settings: Any) -> Backbone:
    """The backbone of that name, or the local diffusers folder at that path; raises UserError for neither."""
    of_folder = {"path": str(local_path(name))} if families.is_folder(name) else {}
    return cast(Backbone, registry.create("backbones", families.opener(name), Backbone, {**of_folder, **settings}))


def load_configured_backbone(config: RunConfig, *, device: str | None = None) -> Backbone:
    """The backbone of a run's configuration, in as many threads; the weights of a new adapter are drawn with its seed.

    Args:
        device: in place of the configuration's.
    """
    torch.set_num_threads(threads_of(config))
    torch.manual_seed(config.seed)
    settings = {"device": config.device, "guidance": config.guidance, **config.backbone.settings}
    if settings["device"] == META:
        raise UserError(f"device {META}: nothing can be drawn on it; `run --dry-run` tells what a model would need")
    device_named(str(settings["device"]))  # also where another one takes its place
    return load_backbone(config.backbone.name, **(settings | ({"device": device} if device else {})))


def opens_on_meta_device(config: RunConfig) -> bool:
    """Whether the configuration's backbone opens without weights, on the device `meta`."""
    cls = registry.find("backbones", families.opener(config.backbone.name), Backbone)
    return bool(cls.supports_meta_device)


def threads_of(config: RunConfig, beside: int = 1) -> int:
    """CPU threads of a process: what the configuration asks for, else `launch.threads`."""
    return config.threads or launch.threads(beside)
