"""Estimates the memory that a run needs, from one model call of each kind. The model may have no values (device `meta`)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, library

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.forecast.expected_rows import ExpectedRows
from alignbench.rollouts.executor import predict
from alignbench.runtime.live_bytes import LiveBytes

WEIGHED_LATENTS = 64
"""Largest number of latents that are decoded to measure the memory of decoding."""


class Memory(BaseModel):
    """Bytes of the model and its training, without scorers, the libraries' own memory and fragmentation."""

    model_config = ConfigDict(extra="forbid")

    weights: int
    """Bytes of all weights that are in memory during the training."""
    text_encoders: int
    """Bytes of weights that are in memory only while prompts are encoded, before the training."""
    gradients: int
    """Bytes of the gradients of the trained parameters."""
    optimizer: int
    """Bytes of the optimizer's state."""
    ema: int
    """Bytes of the moving average of the trained parameters; 0 if the run keeps none."""
    rollout: int
    """Peak bytes that one model call without a gradient allocates."""
    training: int
    """Peak activation bytes of one forward and backward pass of a micro-batch."""
    decoding: int
    """Peak bytes that decoding final latents allocates."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak(self) -> int:
        """Peak bytes of the whole run."""
        trained = self.gradients + self.optimizer + self.ema
        return self.weights + max(self.text_encoders, trained + max(self.rollout, self.training, self.decoding))


@contextmanager
def fused_attention_on_meta() -> Iterator[None]:
    """Makes attention on `meta` allocate what the fused kernels of CPUs and GPUs allocate, inside this context.

    Torch has no fused kernel for this device and would make the matrix of all pairs of tokens, so the operator gets another
    kernel. A TorchFunctionMode would not act in the backward pass, where checkpointed blocks are recomputed.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output

    kernels = library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", attention, "AutogradMeta")
    try:
        yield
    finally:
        del kernels  # restores the original kernel


def estimate_memory(config: RunConfig, policy: Backbone, prompt: str, rows: ExpectedRows, *, guided: bool = True) -> Memory:
    """Estimates the memory of a run from one model call of each kind. On the device `meta` nothing is computed.

    Args:
        config: the configuration of the run.
        policy: its backbone.
        prompt: any prompt that the model can encode.
        rows: the model rows of an iteration.
        guided: whether the rows of training are evaluated with guidance.
    """
    components = policy.components()
    trained = list(policy.parameters())
    trained_bytes = _bytes(trained)
    calls = max(1, round(min(config.micro_batch or rows.widest, rows.widest)))
    replayed = max(1, round(min(config.micro_batch or rows.replay, rows.replay)))

    def velocity(count: int, conditioning: Any) -> Tensor:
        x = torch.zeros(count, *policy.latent_shape, device=policy.device)
        group = torch.zeros(count, dtype=torch.long, device=policy.device)
        return predict(policy, x, 0.5, conditioning, group)

    def peak(work: Callable[[], Any]) -> int:
        with LiveBytes(policy.device) as live:
            work()
        return live.most

    conditioning = policy.encode([prompt])
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with fused_attention_on_meta():
        with torch.no_grad():
            rollout = peak(lambda: velocity(calls, conditioning))
            latents = torch.zeros(min(rows.images, WEIGHED_LATENTS), *policy.latent_shape, device=policy.device)
            decoding = peak(lambda: policy.decode(latents))
        of_training = conditioning if guided else policy.without_guidance(conditioning)
        training = peak(lambda: velocity(replayed, of_training).square().mean().backward())
    for parameter in trained:
        parameter.grad = None
    return Memory(
        weights=sum(_bytes(c.module.parameters()) for c in components.values() if c.training),
        text_encoders=sum(_bytes(c.module.parameters()) for c in components.values() if not c.training),
        gradients=trained_bytes,
        optimizer=2 * trained_bytes,
        ema=trained_bytes if config.ema else 0,
        rollout=rollout,
        training=training,
        decoding=decoding,
    )


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
