"""Measures what torch's allocator gives to a training pass."""

import torch
from torch.profiler import ProfilerActivity, profile

from alignbench.backbone import Backbone
from alignbench.rollouts.executor import predict


def most_allocated(policy: Backbone, prompt: str, count: int) -> int:
    """Measures the largest number of bytes that a forward and backward pass adds at one time, by torch's profiler."""
    x, group = torch.zeros(count, *policy.latent_shape), torch.zeros(count, dtype=torch.long)
    conditioning = policy.encode([prompt])
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def work() -> None:
        predict(policy, x, 0.5, conditioning, group).square().mean().backward()

    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
