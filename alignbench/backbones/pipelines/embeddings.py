"""Text embeddings of several prompts, whose lengths may differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings of P prompts.

    Attributes:
        states: [P, tokens, width], one embedding for each token.
        pooled: [P, width], one embedding of the whole prompt; None for a model without it.
        mask: bool [P, tokens], True at the tokens that the transformer reads; None where it reads all of them.
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Embeddings":
        return Embeddings(self.states[rows], *(None if part is None else part[rows] for part in (self.pooled, self.mask)))

    def split(self) -> "list[Embeddings]":
        """Copies the embeddings of each prompt to the CPU, without the padding at its end; a tensor on `meta` has no values."""
        return [self._one(i) for i in range(len(self.states))]

    def _one(self, i: int) -> "Embeddings":
        read = [] if self.mask is None else self.mask[i].nonzero().flatten().tolist()
        end = read[-1] + 1 if read else None
        row, pooled = slice(i, i + 1), None if self.pooled is None else on_cpu(self.pooled[i : i + 1])
        return Embeddings(
            on_cpu(self.states[row, :end]), pooled, None if self.mask is None else on_cpu(self.mask[row, :end]).bool()
        )

    @staticmethod
    def joined(parts: "Sequence[Embeddings]") -> "Embeddings":
        """All prompts of several embeddings, one after the other; short prompts get padding that is masked."""
        tokens = max(part.states.shape[1] for part in parts)
        states = torch.cat([_padded(part.states, tokens) for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = None
        if any(part.mask is not None or part.states.shape[1] < tokens for part in parts):
            whole = (part.states.new_ones(part.states.shape[:2], dtype=torch.bool) for part in parts)
            masks = torch.cat(
                [_padded(w if part.mask is None else part.mask, tokens) for w, part in zip(whole, parts, strict=True)]
            )
        return Embeddings(states, torch.cat(pooled) if pooled else None, masks)

    def to(self, device: torch.device) -> "Embeddings":
        """The same embeddings on another device."""
        return Embeddings(
            self.states.to(device), *(None if part is None else part.to(device) for part in (self.pooled, self.mask))
        )

    def expand_as(self, other: "Embeddings") -> "Embeddings":
        """The embeddings of a single prompt, as often as `other` has prompts."""
        count = len(other.states)
        return Embeddings(
            self.states.expand(count, -1, -1),
            *(None if part is None else part.expand(count, -1) for part in (self.pooled, self.mask)),
        )


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of the prompts, and of the negative prompt (P = 1) if the model needs it for guidance."""

    prompts: Embeddings
    empty: Embeddings | None


def on_cpu(tensor: Tensor) -> Tensor:
    """Copies a tensor to the CPU; a tensor without values stays without values."""
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()


def _padded(tensor: Tensor, tokens: int) -> Tensor:
    """Zeros at the end of the second dimension, up to this number of tokens."""
    missing = tokens - tensor.shape[1]
    return tensor if not missing else F.pad(tensor, [*[0, 0] * (tensor.ndim - 2), 0, missing])
