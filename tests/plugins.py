"""Plug-ins that runs in tests name by dotted path: a toy policy and scorers that behave in one chosen way."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from alignbench import Objective, RolloutForest, Scorer
from alignbench.backbone import BackboneSettings
from alignbench.config import RunConfig, load_config
from alignbench.scorer import Images
from alignbench.terms import Terms
from tests.toys import ToyBackbone


class ToyPolicy(ToyBackbone):
    Settings = BackboneSettings
    guidance = 1.0

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        self.settings = settings

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """What `decode` put into the first two channels."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels[:, :2]


class Failing(Objective):
    """A plug-in with a fault that shows at its first update."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        raise ZeroDivisionError("a fault of the plug-in")


class Killing(Objective):
    """Ends its process at its first update, as the system does when memory runs out."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class Brightness(Scorer):
    """Mean of the first channel, 0 to 1."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.asarray(images)[..., 0].mean((1, 2)) / 255.0


class Constant(Scorer):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.full(len(prompts), 0.5)


class Sometimes(Brightness):
    """Gives up on every third picture."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        scores = super().score(images, prompts)
        scores[::3] = np.nan
        return scores


class Dying(Brightness):
    """Fails at its fourth call, as a server does that goes away."""

    calls = 0

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        if self.calls == 4:
            raise ConnectionError("the server is gone")
        return super().score(images, prompts)


class Short(Brightness):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return super().score(images, prompts)[:-1]


class Interrupting(Brightness):
    """Presses Ctrl-C at its fourth call."""

    calls = 0

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return super().score(images, prompts)


class Slow(Brightness):
    """A tenth of a second a call, in which a process can be killed."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        time.sleep(0.1)
        return super().score(images, prompts)


def write_task(folder: Path, scorer: str = "Brightness", judges: Sequence[str] = ("diversity",)) -> Path:
    """A task on toy pictures in `folder`; returns its YAML file."""
    (folder / "train.txt").write_text("\n".join(f"train {i}" for i in range(5)))
    (folder / "eval.txt").write_text("\n".join(f"eval {i}" for i in range(6)))
    task: dict[str, Any] = {
        "description": "toy",
        "train_prompts": "train.txt",
        "eval_prompts": "eval.txt",
        "reward": [{"eval": f"tests.plugins:{scorer}", "label": "brightness"}],
        "judges": [{"eval": j} for j in judges],
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


def toy_config(task: Path, **changes: Any) -> RunConfig:
    """Two groups of four, three iterations, in well under a second."""
    options: dict[str, Any] = {
        "backbone": "tests.plugins:ToyPolicy",
        "task": str(task),
        "sampler": {"name": "fixed_tree", "steps": 4, "levels": 2, "children": 2, "splits": [1, 2]},
        "iterations": 3,
        "prompts_per_iteration": 2,
        "optimizer": {"lr": 0.01},
        "evaluation": {"prompts": 6, "images_per_prompt": 3, "steps": 4},
        "threads": 1,
        "pictures": False,
    }
    return load_config(preset="smoke", options={**options, **changes})
