"""The base class of backbones: what a flow-matching text-to-image model must offer to be aligned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from alignbench import settings
from alignbench.errors import UserError

META = "meta"
"""The device on which a backbone opens without its weights."""
MODE_SHARE = 0.05
"""A mode counts where the target has at least this share of its mass."""
COVERED = 0.25
"""It is covered where a model has at least this part of the target's mass there."""


@contextmanager
def temporarily_set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Gives the parameters other values inside the context, and restores their own values afterwards."""
    live = [p.detach().clone() for p in parameters]
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, live)


def checksum(tensor: Tensor) -> int:
    """The sum of the float32 bits of all values as integers, which does not depend on the order of summation."""
    return int(tensor.detach().float().view(torch.int32).sum())


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def device_named(name: str) -> torch.device:
    """The device with this name; `auto` is CUDA where there is a GPU, else the CPU.

    Raises:
        UserError: the name is not valid, or this machine has no such device.
    """
    if name == META:
        return torch.device(META)
    try:
        kind, _, number = settings.checked_device(name).partition(":")
    except ValueError as error:
        raise UserError(f"device {name!r}: {error}") from None
    count = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    if kind == "cuda" and not count:
        why = "sees no CUDA GPU" if torch.version.cuda or torch.version.hip else "is built without CUDA"
        raise UserError(f"device {name}: torch {torch.__version__} {why}; take cpu, or auto")
    if number and int(number) >= count:
        available = "cuda:0 is the only GPU here" if count == 1 else f"the GPUs here are cuda:0 to cuda:{count - 1}"
        raise UserError(f"device {name}: {available}")
    return torch.device(name)


def _device_or_meta(name: str) -> str:
    return name if name == META else settings.checked_device(name)


class BackboneSettings(settings.Settings):
    """The settings of every backbone."""

    device: Annotated[str, AfterValidator(_device_or_meta)] = "auto"
    """Where the model runs. auto: on CUDA where there is a GPU, else on the CPU. meta: nowhere; the model is opened without its
    weights, to estimate what it would need."""
    guidance: float | None = Field(None, ge=1)
    """The scale of guidance, classifier-free or distilled; null takes what the model's own call takes, or else 1."""

    @property
    def torch_device(self) -> torch.device:
        """The device that the setting names; raises UserError if this machine does not have it."""
        return device_named(self.device)


@dataclass(frozen=True)
class Component:
    """A part of a model that holds weights.

    Attributes:
        module: the part.
        training: whether it is in memory while the policy is trained, and not only while prompts are encoded.
    """

    module: nn.Module
    training: bool = True


class Backbone(ABC):
    """A text-to-image flow model with a policy to train and a frozen reference.

    `velocity` is deterministic: no dropout, no dependence of one row on another.
    """

    name: str = ""
    Settings: ClassVar[type[BackboneSettings]] = BackboneSettings
    supports_meta_device: ClassVar[bool] = False
    """Whether it opens without its weights on the device `meta`, so that its needs can be estimated."""

    latent_shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    guidance: float
    """The scale of guidance, 1 for none; the same in rollouts, training and evaluation."""
    default_steps: int
    """Denoising steps of the model's own call."""
    settings: BackboneSettings

    def ineffective_settings(self) -> dict[str, str]:
        """Settings that cannot act beside the others -> the reason."""
        return {}

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """The model's noise schedule, float32 [steps + 1] from 1 to 0, on the CPU."""

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt that no backbone of this class can draw; nothing is loaded."""
        return  # by default any text is a prompt

    def prepare(self, prompts: Sequence[str]) -> None:  # noqa: B027 - most have nothing to prepare
        """Encodes all prompts of a run in advance, so that text encoders need not stay in memory."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Any:
        """The conditioning of the prompts, which `velocity` indexes by `group`; computed once for each prompt."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any, group: Tensor) -> Tensor:
        """The predicted velocity x_1 - x_0, [B, *latent].

        Args:
            x: float32 [B, *latent], the states.
            sigma: float32 [B], the position of each in the noise schedule.
            conditioning: what `encode` returned.
            group: int64 [B], the prompt of each row as an index into the encoded prompts.
        """

    def without_guidance(self, conditioning: Any) -> Any:
        """The same prompts, for which `velocity` predicts the prompt's own velocity without classifier-free guidance.

        Losses on final images use it, since a guided mixture of two velocities is not the regression of any data. By default
        the conditioning stays as it is, for models without such a mixture. A distilled guidance is an input of the network and
        stays as well.
        """
        return conditioning

    def schedule_shift(self) -> float:
        """The shift s of a schedule sigma = s t / (1 + (s - 1) t); for other schedules, sigma / (1 - sigma) halfway."""
        halfway = float(self.sigmas(2)[1])
        return halfway / (1 - halfway)

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes final latents [B, *latent] into images, uint8 [B, H, W, 3]."""

    def check_image(self, image: np.ndarray) -> None:
        """Raises UserError where `encode_images` cannot take this image, uint8 [H, W, 3]; nothing is encoded."""
        return  # by default any image is accepted

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Encodes images, each uint8 [H, W, 3], into latents, float32 [B, *latent]; for training on images from disk.

        Raises:
            UserError: an image has another size than the model's, or this model cannot encode images.
        """
        raise UserError(f"backbone {self.name!r} cannot encode images, which training on fixed pairs needs")

    @abstractmethod
    def trainable(self) -> nn.Module:
        """The module whose parameters with `requires_grad` are the policy."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """While entered, `velocity` predicts with the frozen base model."""

    def unscored(self) -> AbstractContextManager[None]:
        """While entered, `velocity` may compute in a lower precision, because no log-density and no gradient depends on it.

        By default nothing changes.
        """
        return nullcontext()

    def mixed_weights(self, weight: float) -> list[Tensor]:
        """Values of `parameters` for a model between base and policy: base + `weight` (policy - base).

        A backbone whose parameters are an adapter gives those that multiply the adapter's output by `weight`.

        Raises:
            UserError: this backbone cannot mix weights.
        """
        raise UserError(f"backbone {self.name!r} cannot mix the weights of base and trained model; mix velocities instead")

    def shard(self) -> None:
        """Shards the weights over all ranks (FSDP); a rank gathers the weights of a block while it evaluates the block.

        Trained weights beside frozen ones, such as a LoRA, are small and are not sharded.

        Raises:
            UserError: this backbone cannot be sharded.
        """
        raise UserError(f"backbone {self.name!r} cannot be sharded; leave out sharded=true")

    def components(self) -> dict[str, Component]:
        """All parts of the model that hold weights, by name."""
        return {"model": Component(self.trainable())}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return (p for p in self.trainable().parameters() if p.requires_grad)


@dataclass(frozen=True)
class Measured:
    """A metric that a backbone computes about itself.

    Attributes:
        values: float [P], one for each prompt.
        higher_is_better: None where neither direction is better.
    """

    values: np.ndarray
    higher_is_better: bool | None


@dataclass(frozen=True)
class PointDistribution:
    """A distribution in two dimensions, as points with masses.

    Attributes:
        points: float [N, 2].
        mass: float [N], the mass of each point; the sum is 1.
        mode: int [N], the mode of the base model that each point belongs to.
    """

    points: np.ndarray
    mass: np.ndarray
    mode: np.ndarray


@dataclass(frozen=True)
class Tilt:
    """The tilted target p_base exp(beta R) / Z of one prompt, where a backbone knows it.

    Attributes:
        reward: its expected training reward, without a scorer's noise.
        kl: its KL divergence to the base distribution, in nats.
        metrics: what `KnownDistributions.measure` would give for it; empty where that is not known.
        draw: draws so many final latents, float32 [N, *latent], with a generator.
    """

    reward: float
    kl: float
    metrics: dict[str, float]
    draw: Callable[[int, torch.Generator], Tensor]


class KnownDistributions(ABC):
    """A capability of a backbone: its final latents are points whose distribution and target are known.

    A backbone offers it by inheriting from this class beside `Backbone`. A run then records the metrics of `measure` and the
    distributions along its training. `decode` of such a backbone draws points, so that scorers of images can run; a run
    writes no sample images of it.
    """

    @abstractmethod
    def measure(self, prompts: Sequence[str], best_of: int = 1) -> dict[str, Measured]:
        """Computes metrics of the model itself, which need no image: metric -> a value for each prompt.

        Args:
            prompts: the prompts.
            best_of: measure what remains if each image is the best of so many by the reward. Metrics of the velocity are then
                left out.
        """

    @abstractmethod
    def distribution(self, prompt: str, best_of: int = 1) -> PointDistribution | None:
        """The distribution of the final latents of a prompt, each the best of `best_of`; None where it is not
        two-dimensional."""

    @abstractmethod
    def target_distribution(self, prompt: str) -> PointDistribution | None:
        """The distribution that the model is compared with; None where it is not two-dimensional."""

    def tilted(self, prompt: str, beta: float) -> Tilt | None:
        """The target at an inverse temperature on raw rewards; None where it must be estimated from samples."""
        return None
