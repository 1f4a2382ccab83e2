"""The section `keepers` of a run's configuration: what keeps images diverse, beside any objective."""

from typing import Literal

from pydantic import Field, model_validator

from alignbench.settings import Settings


class KeepersConfig(Settings):
    """Terms that keep images diverse and that any objective can carry; all are off by default. See docs/keepers.md.

    Bonuses are added to the reward of each image before it is compared with its group. Distances are those between images of
    one group."""

    cluster_bonus: float = Field(0.0, ge=0)
    """Weight of the bonus sqrt(N / n) of an image whose cluster has n of its group's N images (DiverseGRPO, which has 3 for its
    own rewards). Clusters are spectral, of affinities exp(-d^2 / (2 h^2))."""
    bandwidth: float = Field(0.3, gt=0)
    """h of these affinities, as a share of the median distance in the group."""
    clusters: int | None = Field(None, ge=2)
    """Number of clusters of a group; null takes the number that the largest gap between eigenvalues gives."""
    distance_bonus: float = Field(0.0, ge=0)
    """Weight of the bonus of an image for its mean distance to the others of its group, relative to the group's mean distance.
    It is proportional to how much the group's mean distance would fall without the image."""
    reward_share: float = Field(1.0, gt=0, le=1)
    """Share of a group's images that are trained on, those whose rewards are nearest to the group's median (as the
    reward-concentrated subset of DRIFT); the others count as missing."""
    distance: str = "latents"
    """How distances are measured. latents: root mean square of the difference of final latents. pixels: that of the decoded
    pixels, from 0 to 1. Or the name of an eval that measures the diversity of a set, such as attribute_difference: what it
    gives for the two images."""
    distance_metric: str | None = None
    """Metric of that eval that is the distance; null for its only one, or the one that is called like the eval."""
    data: float = Field(0.0, ge=0)
    """Weight of the denoising error on data in the loss, a forward KL divergence to the data (DDRL, which has 0.01)."""
    data_from: Literal["drawn", "base"] = "drawn"
    """Where data come from. drawn: procedurally drawn images with their prompts, on which `tiny` was trained. base: images that
    the base model draws for the iteration's prompts in as many steps as a rollout has, which costs model rows."""
    data_images: int = Field(16, ge=1)
    """Number of data images in each update."""

    @property
    def bonuses(self) -> dict[str, float]:
        """The bonuses that are on, with their weights."""
        weights = {"cluster_bonus": self.cluster_bonus, "distance_bonus": self.distance_bonus}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def shape_rewards(self) -> bool:
        """Whether any keeper changes the rewards of images."""
        return bool(self.bonuses) or self.reward_share < 1

    def without_effect(self) -> list[str]:
        """A sentence for each setting that is not at its default although nothing reads it, as at a weight of 0 in a sweep."""
        both = ("cluster_bonus", "distance_bonus")
        readers: dict[str, tuple[str, ...]] = {
            **dict.fromkeys(("bandwidth", "clusters"), both[:1]),
            **dict.fromkeys(("distance", "distance_metric"), both),
            **dict.fromkeys(("data_from", "data_images"), ("data",)),
        }
        return [
            f"keepers.{name} has no effect: keepers.{' and keepers.'.join(weights)} {'are' if len(weights) > 1 else 'is'} 0"
            for name, weights in readers.items()
            if getattr(self, name) != type(self).model_fields[name].default and not any(getattr(self, w) for w in weights)
        ]

    @model_validator(mode="after")
    def _metric_is_of_an_eval(self) -> "KeepersConfig":
        if self.distance_metric is not None and self.distance in ("latents", "pixels"):
            raise ValueError(f"keepers.distance_metric names a metric of an eval, and keepers.distance={self.distance} is none")
        return self
