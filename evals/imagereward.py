"""imagereward: how well people would like the picture for its prompt, by ImageReward (for models of photographs).

Xu et al. 2023 (arXiv 2304.05977): a BLIP tuned on rankings, about -2 to 2. It comes with a package of its own, image-reward,
which this project does not install: it asks for old versions of what others need new. Where it does not import, serve it from
an environment of its own: `alignbench serve-scorer imagereward`, and here the eval `remote`.
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
from alignbench.backbones.trust import plain_weights
from alignbench.errors import first_line
from alignbench.scorer import Images, as_arrays


class ImageReward(Scorer):
    class Settings(settings.Settings):
        model: str = "ImageReward-v1.0"
        """A name that the package knows, or a local checkpoint."""
        med_config: str | None = None
        """The text encoder's configuration, for a machine without a network; the package's own where it is null."""
        device: settings.Device = "auto"
        """Device that the model runs on; `auto` takes CUDA where there is one."""

    settings: Settings

    @cached_property
    def model(self) -> Any:
        try:
            package = import_module("ImageReward")
        except Exception as error:  # its imports reach into other packages, and fail in many ways
            raise UserError(
                f"imagereward needs the package image-reward, which does not import here ({type(error).__name__}: {error}); "
                "install it, or serve it elsewhere: alignbench serve-scorer imagereward"
            ) from error
        o, device = self.settings, str(device_named(self.settings.device))
        try:
            with plain_weights():
                return package.load(o.model, device=device, med_config=o.med_config)
        except Exception as error:  # whatever a missing name or a damaged file makes its reader raise
            raise UserError(f"image-reward does not load {o.model!r}: {first_line(error)}") from error

    def prepare(self) -> None:
        self.model  # noqa: B018  (loads it)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """One picture at a time, as the package does."""
        pairs = zip(as_arrays(images), prompts, strict=True)
        return np.array([float(self.model.score(prompt, Image.fromarray(picture))) for picture, prompt in pairs])

    def describe(self) -> dict[str, Any]:
        try:
            return {**super().describe(), "image-reward": version("image-reward")}
        except PackageNotFoundError:
            return super().describe()
