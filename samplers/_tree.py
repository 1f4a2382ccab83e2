"""What the tree samplers share: the settings of a tree, and the plan that splits at given steps."""

from typing import Literal, Self

from pydantic import Field, model_validator

from alignbench import Plan
from alignbench.rollouts.plan import Step
from samplers._noise import NoiseSettings


class TreeSettings(NoiseSettings):
    """The shape of a tree and the rule of its splits."""

    steps: int = Field(6, ge=2)
    """T: how many denoising steps a rollout has."""
    children: int = Field(3, ge=2)
    """k: into how many branches each branch splits."""
    levels: int = Field(3, ge=1)
    """How many steps split. Each tree of a group has children ** levels leaves."""
    max_leaves: int = Field(81, ge=2)
    """The largest number of leaves of a group; more are refused."""
    roots: int = Field(1, ge=1)
    """How many trees a group has. Each has its own initial noise, which its leaves share."""
    first_split: int = Field(1, ge=0)
    """The first step that may split, counted from 0."""
    tail_guard: int = Field(1, ge=1)
    """How many steps at the end never split; at least two, so that sigma is well above 0 at every split."""

    noise_slope: float = 0.0
    """How much eta changes with the depth of a split: the j-th of d splits, j from 0, has
    noise_level * (1 + noise_slope j / d). 0 gives all splits the same noise; above 0 later splits draw more
    (Dynamic-TreeRPO)."""

    def eta_of_split(self, depth: int, noise_level: float) -> float:
        """Computes eta of the split number `depth`, counted from 0, where the first has `noise_level`."""
        return noise_level * (1 + self.noise_slope * depth / self.levels)

    @property
    def last_split(self) -> int:
        """The last step that may split."""
        return self.steps - max(2, self.tail_guard)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        room = self.last_split - self.first_split + 1
        if self.levels > room:
            raise ValueError(
                f"levels={self.levels} splits do not fit into steps {self.first_split}..{self.last_split} of {self.steps}; "
                "raise steps or lower levels"
            )
        if self.noise_slope and self.rule == "memoryless":
            raise ValueError("noise_slope changes the noise, which rule=memoryless fixes; choose another of the two")
        if self.eta_of_split(self.levels - 1, 1.0) <= 0:
            raise ValueError(
                f"noise_slope={self.noise_slope} leaves the last of levels={self.levels} splits no noise; raise it"
            )
        leaves = self.roots * self.children**self.levels
        if leaves > self.max_leaves:
            trees = f"{self.roots} trees of " if self.roots > 1 else ""
            raise ValueError(
                f"{trees}children ** levels = {self.children}**{self.levels} = {leaves} leaves exceed "
                f"max_leaves={self.max_leaves}"
            )
        return self


class FixedSplits(TreeSettings):
    """A tree that splits at the same steps in every iteration."""

    splits: tuple[int, ...]
    """The steps that split, counted from 0: as many different ones as `levels` says."""

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        inside = all(self.first_split <= s <= self.last_split for s in self.splits)
        if not (len(self.splits) == len(set(self.splits)) == self.levels and inside):
            raise ValueError(
                f"splits must be {self.levels} different steps between {self.first_split} and {self.last_split}, "
                f"got {list(self.splits)}"
            )
        return self


class EarlySplit(TreeSettings):
    """A tree that can replace a split at the very start as TMPO's released code does."""

    early_split: Literal["step", "roots"] = "step"
    """What a first split at step 0 or 1 becomes. step: a stochastic step like the others. roots: `children` initial noises, and
    the step is deterministic, as in TMPO's released code."""

    @model_validator(mode="after")
    def _leaves_a_step_to_train_on(self) -> Self:
        if self.early_split == "roots" and self.levels == 1 and self.first_split <= 1:
            raise ValueError("early_split=roots leaves no stochastic step of levels=1; raise levels or first_split")
        return self


def tree_plan(
    settings: TreeSettings, splits: tuple[int, ...], noise_level: float | None = None, *, early_split: str = "step"
) -> Plan:
    """Makes the plan of trees that split at the given steps; the other steps are deterministic.

    Args:
        settings: the shape of the tree and the rule of its splits.
        splits: the steps that split, ascending.
        noise_level: eta of the first split; None for that of the settings.
        early_split: see `EarlySplit`; with "roots" a first split at step 0 or 1 becomes `children` roots.
    """
    level = settings.noise_level if noise_level is None else noise_level
    at = {t: Step(settings.rule, settings.eta_of_split(j, level), settings.children) for j, t in enumerate(splits)}
    roots = settings.roots
    if early_split == "roots" and splits[0] <= 1:
        roots = roots * settings.children
        del at[splits[0]]
    return Plan(tuple(at.get(t, Step()) for t in range(settings.steps)), roots=roots)


def distinct(steps: list[int], first: int, last: int, gap: int = 1) -> tuple[int, ...]:
    """Moves steps apart until they are distinct, each as little as its neighbours allow.

    Args:
        steps: in any order, possibly equal or outside of the range.
        first: the first step of the range.
        last: the last step of the range, which must have room for all of them.
        gap: the smallest difference between two neighbours.

    Returns:
        As many steps, ascending, at least `gap` apart and inside first..last.
    """
    splits = sorted(steps)
    for j in range(len(splits)):
        splits[j] = max(splits[j], first if j == 0 else splits[j - 1] + gap)
    for j in reversed(range(len(splits))):
        splits[j] = min(splits[j], last if j == len(splits) - 1 else splits[j + 1] - gap)
    return tuple(splits)
