"""imagereward: how well people would like the image for its prompt, by ImageReward (for models of photographs).

ImageReward is a BLIP that was tuned on rankings; its scores are about -2 to 2. It needs the package image-reward, which this
project does not install because it requires old versions of other dependencies. If it cannot be imported here, serve it from an
environment of its own (`alignbench serve-scorer imagereward`) and use the eval `remote` here.

Source: Xu et al. 2023 (arXiv 2304.05977).
"""

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from PIL import Image

from alignbench import Scorer, UserError, settings
from alignbench.backbone import device_named
from alignbench.backbones.pipelines.trust import plain_weights
from alignbench.errors import first_line
from alignbench.scorer import Images, as_arrays


class ImageReward(Scorer):
    """Human preference, by the package image-reward."""

    class Settings(settings.Settings):
        model: str = "ImageReward-v1.0"
        """The model: a name that the package knows, or a local checkpoint."""
        med_config: str | None = None
        """A file with the text encoder's configuration, for a machine without internet access; null for the package's own."""
        device: settings.Device = "auto"
        """Device that the model runs on: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`."""

    settings: Settings

    @cached_property
    def model(self) -> Any:
        """The model, which is opened on first use.

        Raises:
            UserError: the package cannot be imported here, or does not load the model.
        """
        try:
            package = import_module("ImageReward")
        except Exception as error:  # it imports from many packages, which can fail in many ways
            raise UserError(
                f"imagereward needs the package image-reward, which cannot be imported here ({type(error).__name__}: {error}); "
                "install it, or serve it from another environment: alignbench serve-scorer imagereward"
            ) from error
        o, device = self.settings, str(device_named(self.settings.device))
        try:
            with plain_weights():
                return package.load(o.model, device=device, med_config=o.med_config)
        except Exception as error:  # whatever a missing name or a damaged file makes its reader raise
            raise UserError(f"image-reward does not load {o.model!r}: {first_line(error)}") from error

    def prepare(self) -> None:
        self.model  # noqa: B018 - opens it

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Scores one image at a time, as the package does."""
        pairs = zip(as_arrays(images), prompts, strict=True)
        return np.array([float(self.model.score(prompt, Image.fromarray(array))) for array, prompt in pairs])

    def describe(self) -> dict[str, Any]:
        try:
            return {**super().describe(), "image-reward": version("image-reward")}
        except PackageNotFoundError:
            return super().describe()
