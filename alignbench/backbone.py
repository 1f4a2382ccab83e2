"""What a flow-matching model must offer to be aligned: the same few calls for every architecture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


@contextmanager
def temporarily_set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """While entered, the parameters hold other values; afterwards their own are back."""
    live = [p.detach().clone() for p in parameters]
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, live)


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def device_named(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UserError: alignbench runs on no such device, or it is not there.
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
        there = "cuda:0 is the only GPU here" if count == 1 else f"the GPUs here are cuda:0 to cuda:{count - 1}"
        raise UserError(f"device {name}: {there}")
    return torch.device(name)


def _device_or_meta(name: str) -> str:
    return name if name == META else settings.checked_device(name)


class BackboneSettings(settings.Settings):
    """What every backbone can be asked for."""

    device: Annotated[str, AfterValidator(_device_or_meta)] = "auto"
    """`auto` takes CUDA where there is one; `meta` opens a model without its weights, to tell what it would need."""
    guidance: float | None = Field(None, ge=1)
    """Guidance, classifier-free or distilled; what the model itself asks for, else 1, where it is null."""

    @property
    def torch_device(self) -> torch.device:
        return device_named(self.device)


@dataclass(frozen=True)
class Component:
    """A part of a model that holds weights.

    Attributes:
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
    """Whether the device `meta` opens it without its weights, to tell what it would need."""

    latent_shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    guidance: float
    """Guidance in force, 1 for none; the same in rollout, training and evaluation."""
    default_steps: int
    """Denoising steps that the model's own call arguments ask for."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """The model's noise schedule, float32 [steps + 1] from 1 to 0, on the CPU."""

    def prepare(self, prompts: Sequence[str]) -> None:  # noqa: B027 - most have nothing to prepare
        """Told all prompts that are to come, so that what only encodes prompts need not stay in memory."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Any:
        """Conditioning of the prompts, to be indexed by row through `velocity`'s `group`; computed once a prompt."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any, group: Tensor) -> Tensor:
        """Predicted x_1 - x_0 for states x [B, *latent] at sigma [B]; row b belongs to prompt group[b]."""

    def without_guidance(self, conditioning: Any) -> Any:
        """The same prompts, for which `velocity` answers with the prompt's own velocity alone.

        Losses on final images ask for it: a mixture of two velocities regresses on nothing. By default the conditioning as it
        is, for models that do not mix. An embedded (distilled) guidance is an input of one network and stays.
        """
        return conditioning

    def schedule_shift(self) -> float:
        """The shift s of a schedule sigma = s t / (1 + (s - 1) t); of any other, the odds of sigma halfway."""
        halfway = float(self.sigmas(2)[1])
        return halfway / (1 - halfway)

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures of final latents, uint8 [B, H, W, 3]."""

    def check_image(self, image: np.ndarray) -> None:
        """Raises UserError where `encode_images` cannot take this image, uint8 [H, W, 3]; known without encoding it."""
        return  # any may do

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Latents of pictures, each uint8 [H, W, 3], float32 [B, *latent]; for training on pictures that were not rolled out.

        Raises:
            UserError: a picture has another size than the model's, or this model cannot encode pictures.
        """
        raise UserError(f"backbone {self.name!r} cannot encode pictures, which training on fixed pairs needs")

    @abstractmethod
    def trainable(self) -> nn.Module:
        """The module whose parameters with `requires_grad` are the policy."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """While entered, `velocity` answers with the frozen base model."""

    def shard(self) -> None:
        """Spreads weights over all processes (FSDP); each gathers those of a block while it asks it.

        What is trained beside frozen weights, such as a LoRA, is small and stays whole.

        Raises:
            UserError: this backbone cannot.
        """
        raise UserError(f"backbone {self.name!r} cannot be sharded; leave out sharded=true")

    def components(self) -> dict[str, Component]:
        """All parts that hold weights, by name."""
        return {"model": Component(self.trainable())}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train."""
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


class KnownDistributions(ABC):
    """A capability of a backbone: its final latents are points whose distribution and target are known.

    A backbone offers it by inheriting from this class beside `Backbone`. A run then records the metrics of `measure` and the
    distributions along its training. `decode` of such a backbone draws points, so that scorers of images can run; a run
    writes no sample images of it.
    """

    @abstractmethod
    def measure(self, prompts: Sequence[str]) -> dict[str, Measured]:
        """Metrics that are computed from the model itself and need no image: metric -> a value for each prompt."""

    @abstractmethod
    def distribution(self, prompt: str) -> PointDistribution | None:
        """The distribution of the final latents of a prompt; None where it is not two-dimensional."""

    @abstractmethod
    def target_distribution(self, prompt: str) -> PointDistribution | None:
        """The distribution with which it is compared; None where it is not two-dimensional."""
