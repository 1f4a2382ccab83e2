"""The toy of TMPO's authors: five modes in the plane, a policy over all points of a grid, the reward is the log-density.

    python results/authors_toy/run.py

writes `result.json` and `densities.png` beside this file, in about a minute. Settings are the authors' (repository
toy-experiment): a grid of 121 x 121 points on [-4, 4]^2, an MLP 2-64-64-1 with SiLU, AdamW of rate 1e-3 and decay 1e-4,
gradients clipped to norm 10, 1,000 steps, beta 1. Each grid point is a leaf of one group, so that p and q are known without
sampling. Our `tmpo` divides rewards by their deviation, so its beta is that deviation times theirs.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.special import rel_entr
from torch import Tensor, nn

from alignbench import load_objective
from alignbench.backbones.mixture.mixtures import Mixture
from alignbench.testing import hand_made_forest

HERE = Path(__file__).parent
POINTS, EXTENT, STEPS, SEEDS = 121, 4.0, 1000, 3
MODES = Mixture(
    weights=torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10], dtype=torch.float64),
    means=torch.tensor([[2.5, 2.5], [-2.5, 2.5], [-2.5, -2.5], [2.5, -2.5], [0, 0]], dtype=torch.float64),
    stds=torch.tensor([0.45, 0.45, 0.45, 0.45, 0.70], dtype=torch.float64),
)
COVERED = 0.25
"""A mode is covered with at least this part of its weight."""


def main() -> None:
    axis = torch.linspace(-EXTENT, EXTENT, POINTS, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    reward = MODES.log_density(grid)
    target = torch.softmax(reward, 0)
    found, distributions = {}, {"target": target}
    for name in ("tmpo", "reward_max"):
        runs = [train(name, seed, grid, reward) for seed in range(SEEDS)]
        distributions[name] = runs[0]
        numbers = [measure(distribution, target, grid, reward) for distribution in runs]
        found[name] = {key: [n[key] for n in numbers] for key in numbers[0]}
    (HERE / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(distributions)
    for name, numbers in found.items():
        for key, values in numbers.items():
            print(f"{name:<11}{key:<18}{', '.join(f'{v:.4f}' for v in values)}")


def train(name: str, seed: int, grid: Tensor, reward: Tensor) -> Tensor:
    """The trained policy's probability of each grid point, float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    points, r = grid.float(), reward.float()
    beta = float(reward.std(correction=0))
    tmpo = load_objective("tmpo", beta=beta, beta_warmup=0, advantage="squared", ratio="none", reference="none", lambda_ref=0.0)
    forest = hand_made_forest([r.tolist()], [[i] for i in range(len(r))], [0.0] * len(r))
    for _ in range(STEPS):
        optimizer.zero_grad()
        log_p = torch.log_softmax(net(points)[:, 0], 0)
        if name == "tmpo":
            loss = tmpo.loss({"log_prob": log_p, "drift_noise": torch.zeros_like(log_p)}, forest) / len(r)
        else:
            loss = -(log_p.exp() * r).sum()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        return torch.softmax(net(points)[:, 0].double(), 0)


def measure(distribution: Tensor, target: Tensor, grid: Tensor, reward: Tensor) -> dict[str, float]:
    nearest = MODES.log_joint(grid).argmax(1)
    mass, wanted = (torch.zeros(5, dtype=torch.float64).index_add(0, nearest, values) for values in (distribution, target))
    middle = (distribution + target) / 2
    return {
        "kl_target_policy": _kl(target, distribution),
        "kl_policy_target": _kl(distribution, target),
        "js_target": (_kl(distribution, middle) + _kl(target, middle)) / 2,
        "modes_covered": float((mass >= COVERED * wanted).sum()),
        "peak": float(distribution.max()),
        "reward": float((distribution * reward).sum()),
    }


def _kl(p: Tensor, q: Tensor) -> float:
    return float(rel_entr(p.numpy(), q.numpy()).sum())


def draw(distributions: dict[str, Tensor]) -> None:
    figure, axes = plt.subplots(1, len(distributions), figsize=(2.2 * len(distributions), 2.4), constrained_layout=True)
    for axis, (name, distribution) in zip(np.atleast_1d(axes), distributions.items(), strict=True):
        picture = distribution.view(POINTS, POINTS).T.flip(0)
        axis.imshow(picture.sqrt(), extent=(-EXTENT, EXTENT, -EXTENT, EXTENT), cmap="cividis")
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    figure.savefig(HERE / "densities.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
