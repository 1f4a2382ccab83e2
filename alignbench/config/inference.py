"""The section `inference` of a run's configuration: how the images of the final evaluation are drawn."""

from typing import Any, Literal

from pydantic import Field, model_validator

from alignbench.settings import Settings

INFERENCE_KEYS: dict[str, tuple[str, ...]] = {
    "ode": (),
    "best_of_n": ("n",),
    "fk": ("n", "strength", "potential", "resamplings", "rule", "eta"),
    "interpolation": ("weight", "of"),
}
"""Each method of `InferenceConfig` with the keys that it reads."""


class InferenceConfig(Settings):
    """How the images of the final evaluation are drawn: from the model as it is, or by a method that needs no training.

    The base model and the evaluations along the training never use such a method. With the objective `none` it is a baseline
    without training."""

    method: Literal["ode", "best_of_n", "fk", "interpolation"] = "ode"
    """ode: the model as it is. best_of_n: the best of `n` images by the trained reward. fk: Feynman-Kac steering, where `n`
    particles are resampled by the reward of their predicted images. interpolation: between base and trained model."""
    n: int = Field(4, ge=1)
    """Number of candidates of an image (best_of_n), or of particles (fk)."""
    strength: float = Field(10.0, ge=0)
    """fk: lambda of the target p exp(lambda reward), on the weighted sum of the raw rewards."""
    potential: Literal["max", "difference", "sum"] = "max"
    """fk: what particles are resampled by: lambda times the largest reward so far, the reward's rise, or the sum so far."""
    resamplings: int = Field(4, ge=0)
    """fk: number of steps, spread evenly from a fifth to four fifths of all, at which particles may be resampled."""
    rule: Literal["sde", "cps", "dance", "memoryless"] = "sde"
    """fk: rule of the stochastic steps."""
    eta: float = Field(0.7, ge=0)
    """fk: amount of noise of each step; with 0 only the initial noises of the particles differ. `memoryless` ignores it."""
    weight: float = 1.0
    """interpolation: w in base + w (trained - base). 0 is the base model, 1 the trained one, and above 1 extrapolates."""
    of: Literal["velocity", "weights"] = "velocity"
    """interpolation: what is mixed: velocities, with two model evaluations per step; or weights (the output of a LoRA)."""

    def in_use(self) -> dict[str, Any]:
        """The method with the settings that it reads."""
        return self.model_dump(include={"method", *INFERENCE_KEYS[self.method]})

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> "InferenceConfig":
        fields = type(self).model_fields
        for name in sorted(self.model_fields_set - {"method", *INFERENCE_KEYS[self.method]}):
            if getattr(self, name) != fields[name].default:
                needed = " or ".join(method for method, keys in INFERENCE_KEYS.items() if name in keys)
                raise ValueError(f"inference.{name} has no effect with inference.method={self.method}; it belongs to {needed}")
        return self
