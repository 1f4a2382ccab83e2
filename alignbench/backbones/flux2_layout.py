"""What the folders of FLUX.2 share: the layout of latents, and a shift that depends on the number of steps."""

from math import exp
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.backbones.pipelines.embeddings import Embeddings

LONGEST = 4300
"""Number of tokens of an image above which the shift no longer depends on the number of steps."""


class Flux2Layout(DiffusersFolder):
    """A folder of FLUX.2. Each latent is a token: it combines 2 x 2 latents of the autoencoder, with normalised channels."""

    class Settings(DiffusersFolder.Settings):
        lora_rank: int = Field(32, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(64, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")
        """Ends of the names of modules that get a LoRA; the default is that of the DreamBooth scripts of diffusers."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._positions = image_positions(*self.latent_shape[1:]).to(self.device)

    @property
    def patch(self) -> int:
        return 1

    @property
    def latent_pixels(self) -> int:
        return 2 * super().latent_pixels

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    @property
    def text_tokens(self) -> int:
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, None]:
        return self.pipeline.transformer.config.joint_attention_dim, None

    def shift_of(self, steps: int) -> float:
        if not self.schedule.dynamic:
            return super().shift_of(steps)
        mu = empirical_mu(self.image_tokens, steps)
        return exp(mu) if self.schedule.exponential else mu

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        length = self.call["max_sequence_length"]
        return Embeddings(pipeline.encode_prompt(prompt=prompts, max_sequence_length=length, device=self.device)[0])

    def predict(self, x: Tensor, sigma: Tensor, texts: Embeddings, guidance: Tensor | None) -> Tensor:
        """Calls the transformer once, for latents [B, C, H, W]; returns the velocity in the same shape."""
        answer = self.call_transformer(
            hidden_states=x.to(self.weights_dtype).flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=texts.states,
            txt_ids=text_positions(texts.states.shape[1]).to(self.device),
            img_ids=self._positions,
        )
        return answer.transpose(1, 2).unflatten(2, x.shape[2:])

    def vae_decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode(self.unnormalised(latents).to(vae.dtype), return_dict=False)[0]
        return decoded

    def vae_encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded: Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics()
        return (torch.nn.functional.pixel_unshuffle(encoded, 2) - mean) / std

    def unnormalised(self, latents: Tensor) -> Tensor:
        """Converts latents [B, C, H, W] to those of the autoencoder, [B, C / 4, 2 H, 2 W]."""
        mean, std = self._statistics()
        return torch.nn.functional.pixel_shuffle(latents * std + mean, 2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each channel, which the autoencoder keeps in a batch norm."""
        vae = self.pipeline.vae
        mean, variance = (value.view(1, -1, 1, 1).float() for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def empirical_mu(tokens: int, steps: int) -> float:
    """Computes the logarithm of FLUX.2's shift, which is linear in the tokens of an image, and up to 4300 tokens in the steps.

    Args:
        tokens: number of tokens of an image.
        steps: number of denoising steps.

    Source: `src/flux2/sampling.py` of FLUX.2's code, whose constants are for 10 and for 200 steps.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LONGEST:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / 190


def image_positions(rows: int, columns: int) -> Tensor:
    """Makes the positions of an image's tokens for the rotary embedding, [rows * columns, 4]: (0, row, column, 0)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    zero = torch.zeros_like(row)
    return torch.stack([zero, row, column, zero], dim=-1).reshape(-1, 4)


def text_positions(tokens: int) -> Tensor:
    """Makes the positions of a prompt's tokens for the rotary embedding, [tokens, 4]: (0, 0, 0, token)."""
    return torch.nn.functional.pad(torch.arange(tokens)[:, None], [3, 0])
