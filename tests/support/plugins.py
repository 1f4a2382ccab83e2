"""Plug-ins that tests name by dotted path: a toy policy, and objectives and scorers with a chosen behaviour."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor

from alignbench import Objective, RolloutForest, Scorer, settings
from alignbench.backbone import BackboneSettings
from alignbench.config.run_config import RunConfig, load_config
from alignbench.objective import Strength
from alignbench.rollouts.terms import Terms, log_ratio
from alignbench.scorer import Images
from alignbench.settings import Settings as PluginSettings
from tests.support.toys import ToyBackbone


class ToyPolicy(ToyBackbone):
    Settings = BackboneSettings
    guidance = 1.0

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        self.settings = settings

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Returns what `decode` puts into the first two channels."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels[:, :2]


class DriftingInSecondProcess(ToyPolicy):
    """Starts from other weights on one of several ranks."""

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__(settings)
        if os.environ["RANK"] == "1":
            self.nudge(1e-6)


class CrampedInSecondProcess(ToyPolicy):
    """Runs out of memory with more than three rows in a model call, on only one of several ranks."""

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        if len(x) > 3 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")
        return super().velocity(x, sigma, conditioning, group)


class Cramped(ToyPolicy):
    """Runs out of memory with more than `room` rows in a model call."""

    room: ClassVar[int] = 5

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.\nMore about it.")
        return super().velocity(x, sigma, conditioning, group)


class Drawing(Objective):
    """A plug-in that draws from the global generators, which it should not do."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        drawn = torch.rand(len(terms["log_prob"])) + float(np.random.rand()) + random.random()
        return (terms["log_prob"] * drawn).mean()


class Bursting(Objective):
    """Its loss is infinite at the third iteration."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return terms["log_prob"].mean() / (0.0 if forest.iteration == 2 else 1.0)


class Failing(Objective):
    """A plug-in with a fault that shows at its first update."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        raise ZeroDivisionError("a fault of the plug-in")


class Killing(Objective):
    """Ends its process at its first update, as the system does when memory runs out."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class _PolicyGradient(Objective):
    """Follows `direction` times the gradient of the expected reward."""

    def direction(self, iteration: int) -> float:
        raise NotImplementedError

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        rewards = forest.by_group(forest.rewards)
        advantage = (rewards - rewards.mean(1, keepdim=True)).float()
        return -self.direction(forest.iteration) * (advantage * forest.path_sum(log_ratio(terms, forest))).mean()


class Misaimed(_PolicyGradient):
    """Walks away from the reward by default, and straight to it with an aim above 0."""

    class Settings(settings.Settings):
        aim: float = -1.0

    strength = Strength("aim", (-1.0, 1.0))

    def direction(self, iteration: int) -> float:
        return float(self.settings.aim)


class Wavering(_PolicyGradient):
    """Takes two steps towards the reward and one back, whatever its settings are."""

    def direction(self, iteration: int) -> float:
        return -1.0 if iteration % 3 == 2 else 1.0


class Brightness(Scorer):
    """Mean of the first channel, 0 to 1."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.asarray(images)[..., 0].mean((1, 2)) / 255.0


class Constant(Scorer):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.full(len(prompts), 0.5)


class NearlyConstant(Scorer):
    """Returns scores that differ by one unit of float32's rounding."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return np.where(np.arange(len(prompts)) % 2, np.float32(0.95), np.nextafter(np.float32(0.95), np.float32(1)))


class Faint(Brightness):
    """Returns brightness in units so large that it is rounded away."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return super().score(images, prompts) * 1e-6


class Sometimes(Brightness):
    """Returns NaN for every third image."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        scores = super().score(images, prompts)
        scores[::3] = np.nan
        return scores


class ThirdOfFour(Brightness):
    """Returns NaN for the third image of each group of four."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        scores = super().score(images, prompts)
        scores[2::4] = np.nan
        return scores


class AtFourthCall(Brightness):
    """Returns valid scores except at its fourth call, which is in the third iteration."""

    calls = 0

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        right = super().score(images, prompts)
        return self.answer(right) if self.calls == 4 else right

    def answer(self, right: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Dying(AtFourthCall):
    """Raises an error, like a server that has gone away."""

    def answer(self, right: np.ndarray) -> np.ndarray:
        raise ConnectionError("the server is gone")


class DyingInSecondProcess(Dying):
    """Raises an error on only one of several ranks."""

    def answer(self, right: np.ndarray) -> np.ndarray:
        return super().answer(right) if os.environ["RANK"] == "1" else right


class Hanging(AtFourthCall):
    """Hangs, and treats any exception that stops it as a failure of one image."""

    def answer(self, right: np.ndarray) -> np.ndarray:
        try:
            time.sleep(60)
        except Exception:
            return np.full_like(right, np.nan)
        return right


class Knowing(AtFourthCall):
    """Returns NaN for every image."""

    def answer(self, right: np.ndarray) -> np.ndarray:
        return np.full_like(right, np.nan)


class Boundless(AtFourthCall):
    def answer(self, right: np.ndarray) -> np.ndarray:
        return right / 0.0


class Shortened(AtFourthCall):
    def answer(self, right: np.ndarray) -> np.ndarray:
        return right[:-1]


class Short(Brightness):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return super().score(images, prompts)[:-1]


class Interrupting(AtFourthCall):
    """Presses Ctrl-C."""

    def answer(self, right: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt


class Waiting(AtFourthCall):
    """Writes a file `waiting-RANK` into the folder `meeting` at its fourth call, and waits until there is a file `go`."""

    class Settings(PluginSettings):
        meeting: Path

    def answer(self, right: np.ndarray) -> np.ndarray:
        (self.settings.meeting / f"waiting-{os.environ.get('RANK', '0')}").touch()
        while not (self.settings.meeting / "go").exists():
            time.sleep(0.01)
        return right


class Counted(Brightness):
    """Writes a line into `file` for each image it scores: the first word of its prompt."""

    class Settings(PluginSettings):
        file: Path

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        with self.settings.file.open("a") as file:
            file.writelines(f"{prompt.split()[0]}\n" for prompt in prompts)
        return super().score(images, prompts)


class Slow(Brightness):
    """A tenth of a second a call, in which a process can be killed."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        time.sleep(0.1)
        return super().score(images, prompts)


def write_task(folder: Path, scorer: str = "Brightness", judges: Sequence[str] = ("diversity",), **settings: Any) -> Path:
    """Writes a task on toy images into `folder`, with these settings of the scorer; returns its YAML file."""
    (folder / "train.txt").write_text("\n".join(f"train {i}" for i in range(5)))
    (folder / "eval.txt").write_text("\n".join(f"eval {i}" for i in range(6)))
    (folder / "validation.txt").write_text("\n".join(f"validation {i}" for i in range(4)))
    task: dict[str, Any] = {
        "description": "toy",
        "train_prompts": "train.txt",
        "eval_prompts": "eval.txt",
        "validation_prompts": "validation.txt",
        "reward": [{"eval": f"tests.support.plugins:{scorer}", "label": "brightness", "settings": settings}],
        "judges": [{"eval": j} for j in judges],
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


def toy_config(task: Path, **changes: Any) -> RunConfig:
    """Makes a configuration with two groups of four and three iterations, which takes well under a second."""
    options: dict[str, Any] = {
        "backbone": "tests.support.plugins:ToyPolicy",
        "task": str(task),
        "sampler": {"name": "fixed_tree", "steps": 4, "levels": 2, "children": 2, "splits": [1, 2]},
        "iterations": 3,
        "prompts_per_iteration": 2,
        "optimizer": {"lr": 0.01},
        "evaluation": {"prompts": 6, "images_per_prompt": 3, "steps": 4},
        "threads": 1,
        "save_images": False,
    }
    return load_config(preset="smoke", options={**options, **changes})
