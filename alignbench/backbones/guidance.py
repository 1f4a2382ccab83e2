"""The two kinds of guidance in diffusers folders.

Classifier-free guidance mixes the velocity for a prompt with that for a negative prompt. Distilled guidance is an input of
the transformer.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.backbones.pipelines.embeddings import Conditioning, Embeddings


class GuidedFolder(DiffusersFolder):
    """A folder with classifier-free guidance. With a guidance above 1, a model row takes two rows of the transformer."""

    NEGATIVE: ClassVar[str] = ""
    """The negative prompt."""

    @property
    def negative_prompt(self) -> str | None:
        return self.NEGATIVE if self.guidance > 1 else None

    @abstractmethod
    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        """The velocity without guidance, [B, *latent]; `texts` has B rows."""

    def mix(self, unguided: Tensor, guided: Tensor) -> Tensor:
        """The velocity with guidance, from those for the negative prompt and for the prompt."""
        return unguided + self.guidance * (guided - unguided)

    def without_guidance(self, conditioning: Conditioning) -> Conditioning:
        return conditioning if conditioning.empty is None else replace(conditioning, empty=None)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        texts = conditioning.prompts[group]
        if conditioning.empty is None:
            return self.answer(x, sigma, texts)
        both = Embeddings.joined([conditioning.empty.expand_as(texts), texts])
        unguided, guided = self.answer(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return self.mix(unguided, guided)


class DistilledFolder(DiffusersFolder):
    """A folder whose transformer takes the guidance as an input, without a second row, or that has no guidance at all."""

    def _guidance(self) -> float:
        """The guidance is 1 for a model without this input."""
        if self.pipeline.transformer.config.guidance_embeds:
            return super()._guidance()
        if (self.settings.guidance or 1) > 1:
            raise UserError(f"{self.folder}/transformer has no guidance (guidance_embeds is false); leave guidance at 1")
        return 1.0

    def guidance_input(self, sigma: Tensor) -> Tensor | None:
        """The input of the transformer for each row; None for a model without it."""
        return torch.full_like(sigma, self.guidance) if self.pipeline.transformer.config.guidance_embeds else None
