"""branch: a tree, stochastic at every step but the last, that splits at a few fixed steps.

Unlike in the other trees a branch also draws noise between its splits, and these steps are trained on. With depth pruning a
window of steps is not trained on: it starts at the image, where the tree is widest and a step costs most, and moves towards the
noise during the training. With width pruning all leaves are drawn and scored, but only the paths to some of them are trained
on.

Source: BranchGRPO (arXiv 2509.06040). How it differs: docs/samplers.md.
"""

from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import one_hot

from alignbench import Plan, RolloutForest, Sampler, groups
from alignbench.rollouts.plan import Step
from samplers._schedule import place_at
from samplers._tree import FixedSplits


class Branch(Sampler):
    """A tree that is stochastic between its splits too."""

    class Settings(FixedSplits):
        levels: int = Field(2, ge=1)
        """How many steps split. A tree has children ** levels leaves."""
        first_split: int = Field(0, ge=0)
        """The first step that may split, counted from 0."""
        splits: tuple[int, ...] = (0, 2)
        """The steps that split, counted from 0: as many different ones as `levels` says."""
        split_noise_level: float | None = Field(None, gt=0)
        """eta of the steps that split; null for that of the other steps."""
        split_noise_scale: float = Field(1.0, gt=0)
        """A factor for the noise that is drawn at splits; it changes neither the mean nor the density of the step. BranchGRPO's
        script has 4, which draws from another distribution than the policy's."""
        depth_pruning: int = Field(0, ge=0)
        """How many stochastic steps in a row are not trained on; fewer than `steps` - 1."""
        pruning_stop: int = Field(0, ge=0)
        """The first of these steps at the end of the training, counted from 0."""
        width_pruning: Literal["none", "parent_top1", "extreme"] = "none"
        """Which leaves are trained on. none: all. parent_top1: the best child of each branch at the last split. extreme: the
        best and the worst leaves of each group."""
        extremes: int = Field(2, ge=1)
        """With `width_pruning: extreme`, how many of the best leaves and how many of the worst are trained on."""

        @model_validator(mode="after")
        def _leaves_steps_to_train_on(self) -> Self:
            stochastic = self.steps - 1
            if self.depth_pruning and self.pruning_stop + self.depth_pruning > stochastic:
                raise ValueError(
                    f"depth_pruning={self.depth_pruning} steps from pruning_stop={self.pruning_stop} on do not fit into "
                    f"the {stochastic} stochastic steps; lower one of the two"
                )
            if self.depth_pruning == stochastic:
                raise ValueError(f"depth_pruning={self.depth_pruning} leaves no step to train on; lower it")
            leaves = self.roots * self.children**self.levels
            if self.width_pruning == "extreme" and 2 * self.extremes >= leaves:
                raise ValueError(f"extremes={self.extremes} best and as many worst are all of {leaves} leaves; lower it")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        first = o.steps - 1 - o.depth_pruning  # where the window of pruned steps starts at the beginning of the training
        start = first - place_at(progress, first - o.pruning_stop + 1)
        pruned = range(start, start + o.depth_pruning)

        def step(t: int) -> Step:
            splits = t in o.splits
            eta = o.noise_level
            if splits:
                eta = o.eta_of_split(sorted(o.splits).index(t), o.split_noise_level or o.noise_level)
            scale = o.split_noise_scale if splits else 1.0
            return Step(o.rule, eta, o.children if splits else 1, scored=t not in pruned, noise_scale=scale)

        return Plan(steps=(*(step(t) for t in range(o.steps - 1)), Step()), roots=o.roots)

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """Marks the leaves that width pruning leaves to train on: bool [G * K]; None for all."""
        o = self.settings
        if o.width_pruning == "none":
            return None
        rewards = forest.by_group(forest.rewards)
        valid_mask = groups.valid(rewards)
        low, high = torch.where(valid_mask, rewards, -torch.inf), torch.where(valid_mask, rewards, torch.inf)
        if o.width_pruning == "parent_top1":
            # The leaves below one branch of the last split are consecutive.
            best = low.view(-1, o.children).argmax(dim=1)
            return one_hot(best, o.children).bool().flatten()
        extremes = torch.cat([low.topk(o.extremes).indices, high.topk(o.extremes, largest=False).indices], dim=1)
        return (torch.zeros_like(valid_mask).scatter(1, extremes, True) & valid_mask).flatten()
