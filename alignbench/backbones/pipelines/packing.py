"""Latents as tokens of 2 x 2 latents, as the transformers of FLUX and Qwen-Image read them."""

from torch import Tensor

PATCH = 2
"""Side of a token, in latents."""


def pack(latents: Tensor) -> Tensor:
    """Packs latents [B, C, H, W] into tokens [B, H/2 * W/2, C * 4]: a token has 2 x 2 latents; tokens are row by row."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents with this height and width."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)
