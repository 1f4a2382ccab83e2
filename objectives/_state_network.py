"""A small network of the noisy state, for objectives that learn a number for each state (a value, a flow)."""

from typing import Any

import torch
from torch import Tensor, nn


def state_network(latent_shape: tuple[int, ...], hidden: int, device: torch.device) -> nn.Sequential:
    """Makes a network with one hidden layer whose output is 0 for every state at first.

    Args:
        latent_shape: the shape of a latent, channels first.
        hidden: the number of hidden units.
        device: the device of its parameters.
    """
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(2 * latent_shape[0] + 1, hidden), nn.Tanh(), last).to(device)


def state_features(rows: Any) -> Tensor:
    """Computes the network's input: mean and standard deviation of each latent channel, and sigma; float32 [R', 2 C + 1]."""
    channels = rows.x.float().flatten(1).view(len(rows), rows.x.shape[1], -1)
    return torch.cat([channels.mean(2), channels.std(2, correction=0), rows.sigma[:, None]], dim=1)
