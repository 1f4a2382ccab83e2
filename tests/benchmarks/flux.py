"""A FLUX transformer of random weights, small enough for a CPU: the architecture, not a model that draws anything."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.backbones.flux import image_positions
from alignbench.rollouts.noise import seed_of

CHANNELS, WIDTH, TEXT = 16, 64, 16
"""Of a latent's token, of the text embeddings; tokens of the text."""


@dataclass(frozen=True)
class Conditioning:
    """[P, TEXT, WIDTH] and [P, WIDTH]."""

    states: Tensor
    pooled: Tensor


class TinyFlux(Backbone):
    """Latents [side * side, CHANNELS], one token each, as FLUX packs them; all weights are trained."""

    name = "tiny_flux"
    device = torch.device("cpu")
    dtype = torch.float32
    guidance = 1.0
    default_steps = 6

    def __init__(self, side: int = 8) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.transformer: Any = FluxTransformer2DModel(
                patch_size=1,
                in_channels=CHANNELS,
                num_layers=2,
                num_single_layers=4,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(8, 12, 12),
            )
        self.latent_shape = (side * side, CHANNELS)
        self.positions = image_positions(side, side)

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps, flow.dynamic_shift(1024))  # FLUX's at 512 x 512

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        generators = [torch.Generator().manual_seed(seed_of(prompt)) for prompt in prompts]
        states = torch.stack([torch.randn(TEXT + 1, WIDTH, generator=g) for g in generators])
        return Conditioning(states[:, :-1], states[:, -1])

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        answer: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=conditioning.states[group],
            pooled_projections=conditioning.pooled[group],
            timestep=sigma,
            img_ids=self.positions,
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )[0]
        return answer

    def decode(self, latents: Tensor) -> np.ndarray:
        raise NotImplementedError("random weights draw nothing")

    def trainable(self) -> nn.Module:
        module: nn.Module = self.transformer
        return module

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield
