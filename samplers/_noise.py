"""The noise of stochastic steps: its rule and its amount, as every sampler takes them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from alignbench import settings


class NoiseSettings(settings.Settings):
    """The rule of stochastic steps and its eta; the rule `memoryless` has an eta of its own."""

    rule: Literal["sde", "cps", "dance", "memoryless"] = "cps"
    """The rule of the stochastic steps; all others are deterministic. memoryless: the exact ancestral step, with as much noise
    as makes an image independent of its first noise, which matching a tilted target needs (arXiv 2409.08861)."""
    noise_level: float = Field(0.7, gt=0)
    """eta of the rule: how much noise a stochastic step draws. At most 1 for cps; memoryless fixes it, and has 1 here."""

    @model_validator(mode="before")
    @classmethod
    def _noise_of_its_own(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("rule") == "memoryless":
            if values.get("noise_level", 1) != 1:
                raise ValueError("noise_level: rule memoryless fixes the noise of each step; leave noise_level out")
            return {**values, "noise_level": 1.0}
        return values
