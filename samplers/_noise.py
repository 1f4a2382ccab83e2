"""The noise of stochastic steps: its rule and its amount, which are settings of every sampler."""

from typing import Any, Literal

from pydantic import Field, model_validator

from alignbench import settings


class NoiseSettings(settings.Settings):
    """The rule of the stochastic steps, and eta. The rule `memoryless` fixes the noise itself."""

    rule: Literal["sde", "cps", "dance", "memoryless"] = "cps"
    """The rule of the stochastic steps; all other steps are deterministic. sde: Flow-GRPO. cps: coefficients-preserving
    sampling. dance: DanceGRPO. memoryless: the exact ancestral step, whose noise makes the image independent of its initial
    noise, as the matching of a tilted target requires (arXiv 2409.08861)."""
    noise_level: float = Field(0.7, gt=0)
    """eta of the rule: how much noise a stochastic step draws. At most 1 for cps; always 1 for memoryless."""

    @model_validator(mode="before")
    @classmethod
    def _memoryless_fixes_noise(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("rule") == "memoryless":
            if values.get("noise_level", 1) != 1:
                raise ValueError("noise_level: rule memoryless fixes the noise of each step; leave noise_level out")
            return {**values, "noise_level": 1.0}
        return values
