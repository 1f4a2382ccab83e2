"""What the tree samplers share: settings of the geometry, and the plan of given splits."""

from typing import Literal, Self

from pydantic import Field, model_validator

from alignbench import Plan, settings
from alignbench.rollouts.plan import Step


class TreeSettings(settings.Settings):
    steps: int = Field(6, ge=2)
    """T, denoising steps of a rollout."""
    children: int = Field(3, ge=2)
    """k, into how many each branch splits."""
    levels: int = Field(3, ge=1)
    """How many steps split; the leaves are children ** levels."""
    max_leaves: int = Field(81, ge=2)
    """Refuse trees with more leaves than this."""
    rule: Literal["sde", "cps", "dance"] = "cps"
    """Rule of the splitting steps; all others are deterministic."""
    noise_level: float = Field(0.7, gt=0)
    """Its noise level."""
    first_split: int = Field(1, ge=0)
    """The earliest step that may split."""
    tail_guard: int = Field(1, ge=1)
    """Steps at the end that never split, at least two where the tree leaves room: sigma stays well above 0."""

    @property
    def last_split(self) -> int:
        """The latest step that may split."""
        return self.steps - max(2, self.tail_guard)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        room = self.last_split - self.first_split + 1
        if self.levels > room:
            raise ValueError(
                f"levels={self.levels} splits do not fit into steps {self.first_split}..{self.last_split} of {self.steps}; "
                "raise steps or lower levels"
            )
        if self.children**self.levels > self.max_leaves:
            raise ValueError(
                f"children ** levels = {self.children}**{self.levels} = {self.children**self.levels} leaves exceed "
                f"max_leaves={self.max_leaves}"
            )
        return self


class FixedSplits(TreeSettings):
    """Splits that do not change."""

    splits: tuple[int, ...]
    """Steps that split."""

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
    """What TMPO's released code makes of a split at the very start."""

    early_split: Literal["step", "roots"] = "step"
    """What a first split at step 0 or 1 is. step: a stochastic step like the others. roots: as many initial noises, with a
    deterministic step in its place, as in TMPO's released code."""

    @model_validator(mode="after")
    def _leaves_a_step_to_train_on(self) -> Self:
        if self.early_split == "roots" and self.levels == 1 and self.first_split <= 1:
            raise ValueError("early_split=roots leaves no stochastic step of levels=1; raise levels or first_split")
        return self


def tree_plan(
    settings: TreeSettings, splits: tuple[int, ...], noise_level: float | None = None, *, early_split: str = "step"
) -> Plan:
    """One root; the given steps split, the others are deterministic.

    Args:
        noise_level: the settings' where it is None.
        early_split: see `EarlySplit`; with "roots" a first split at step 0 or 1 becomes `children` roots.
    """
    split = Step(settings.rule, settings.noise_level if noise_level is None else noise_level, settings.children)
    roots = 1
    if early_split == "roots" and splits[0] <= 1:
        roots, splits = settings.children, splits[1:]
    return Plan(tuple(split if t in splits else Step() for t in range(settings.steps)), roots=roots)


def distinct(wanted: list[int], first: int, last: int, gap: int = 1) -> tuple[int, ...]:
    """Sorted, at least `gap` apart and inside first..last; each as near to what was wanted as its neighbours allow."""
    splits = sorted(wanted)
    for j in range(len(splits)):
        splits[j] = max(splits[j], first if j == 0 else splits[j - 1] + gap)
    for j in reversed(range(len(splits))):
        splits[j] = min(splits[j], last if j == len(splits) - 1 else splits[j + 1] - gap)
    return tuple(splits)
