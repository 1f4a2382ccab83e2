"""branch: one root, stochastic at every step but the last, that splits at a few fixed steps.

BranchGRPO (arXiv 2509.06040). Unlike in the other trees a branch also draws noise between its splits, and each of these
steps is trained on. With depth pruning a window of steps is not: it stands at the picture at first, where the tree is widest
and a step costs most, and moves towards the noise as the training goes on. With width pruning all leaves are drawn and
scored, and the paths to some of them are trained on.
"""

from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import one_hot

from alignbench import Plan, RolloutForest, Sampler, groups
from alignbench.rollouts.plan import Step
from samplers._tree import FixedSplits


class Branch(Sampler):
    class Settings(FixedSplits):
        levels: int = Field(2, ge=1)
        """How many steps split; the leaves are children ** levels."""
        first_split: int = Field(0, ge=0)
        """The earliest step that may split."""
        splits: tuple[int, ...] = (0, 2)
        """Steps that split."""
        split_noise_level: float | None = Field(None, gt=0)
        """Noise level of the splitting steps; that of the others where it is null."""
        split_noise_scale: float = Field(1.0, gt=0)
        """Multiplies the noise that splitting steps draw, and neither their mean nor their density: BranchGRPO's script has 4,
        which draws from another distribution than the policy's."""
        depth_pruning: int = Field(0, ge=0)
        """How many stochastic steps in a row are not trained on."""
        pruning_stop: int = Field(0, ge=0)
        """The step at which their window has come to at the end of the training."""
        width_pruning: Literal["none", "parent_top1", "extreme"] = "none"
        """parent_top1 trains on the best child of each branch at the last split, extreme on a group's best and worst leaves."""
        extremes: int = Field(2, ge=1)
        """How many best and how many worst leaves `extreme` keeps."""

        @model_validator(mode="after")
        def _leaves_steps_to_train_on(self) -> Self:
            stochastic = self.steps - 1
            if self.depth_pruning and self.pruning_stop + self.depth_pruning > stochastic:
                raise ValueError(
                    f"depth_pruning={self.depth_pruning} steps from pruning_stop={self.pruning_stop} on do not fit into "
                    f"the {stochastic} stochastic ones"
                )
            if self.depth_pruning == stochastic:
                raise ValueError(f"depth_pruning={self.depth_pruning} leaves no step to train on; lower it")
            leaves = self.children**self.levels
            if self.width_pruning == "extreme" and 2 * self.extremes >= leaves:
                raise ValueError(f"extremes={self.extremes} best and as many worst are all of {leaves} leaves; lower it")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        first = o.steps - 1 - o.depth_pruning  # of the window, at the picture
        places = first - o.pruning_stop + 1
        start = first - min(int(min(max(progress, 0.0), 1.0) * places), places - 1)
        pruned = range(start, start + o.depth_pruning)

        def step(t: int) -> Step:
            splits = t in o.splits
            level = o.split_noise_level if splits and o.split_noise_level else o.noise_level
            scale = o.split_noise_scale if splits else 1.0
            return Step(o.rule, level, o.children if splits else 1, scored=t not in pruned, noise_scale=scale)

        return Plan(steps=(*(step(t) for t in range(o.steps - 1)), Step()))

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        o = self.settings
        if o.width_pruning == "none":
            return None
        rewards = forest.by_group(forest.rewards)
        scored = groups.valid(rewards)
        low, high = torch.where(scored, rewards, -torch.inf), torch.where(scored, rewards, torch.inf)
        if o.width_pruning == "parent_top1":
            # Leaves below one branch of the last split stand side by side.
            best = low.view(-1, o.children).argmax(dim=1)
            return one_hot(best, o.children).bool().flatten()
        chosen = torch.cat([low.topk(o.extremes).indices, high.topk(o.extremes, largest=False).indices], dim=1)
        return (torch.zeros_like(scored).scatter(1, chosen, True) & scored).flatten()
