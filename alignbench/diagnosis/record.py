"""The record of a diagnosis, `diagnosis.json`. Each estimate has a 95 % interval over groups."""

from alignbench.records.base import Record
from alignbench.records.record import Estimate

SCHEMA_VERSION = 1


class Distance(Record):
    """The mean distance |z - z'| / sqrt(D) between two leaves of a group, for the pairs that diverge at one place."""

    apart_since: str
    """`root` if the two leaves have no common root, or `split j` if their paths diverge at the j-th split."""
    sampler: Estimate
    independent: Estimate
    """The distance between any two leaves of an independent group."""


class PrefixEntropy(Record):
    """How evenly a group's mass is spread over its prefixes: the entropy divided by its maximum, log(prefixes)."""

    prefixes: int
    policy: Estimate
    """Entropy of p, the softmax of the path log-probabilities over the group."""
    target: Estimate
    """Entropy of q, the softmax of beta times the reward, which is standardised in the group."""


class TotalVariation(Record):
    """Lower bounds, in expectation, of the total variation distance between rollouts of the sampler and independent ones."""

    leaf: Estimate
    """The bound for single leaves. Their distributions are equal, so the expected value is 0."""
    group: Estimate
    """The bound for whole groups."""


class PartitionFunction(Record):
    """Errors of log Z_hat = log mean_i exp(beta z_i) over K leaves; the true log Z comes from many independent leaves."""

    k: int
    pooled_groups: int
    """Number of the sampler's groups that give the K leaves; 1 if the K leaves are all or some of one group."""
    sampler_bias: Estimate
    independent_bias: Estimate
    sampler_deviation: Estimate
    """Standard deviation of log Z_hat."""
    independent_deviation: Estimate


class Slope(Record):
    """The slope of log(-bias) or log(standard deviation) over log K; null if fewer than two values of K are usable."""

    quantity: str
    """`bias` or `deviation`."""
    of: str
    """`sampler`, for parts of one of its groups, or `independent`."""
    sizes: list[int]
    """The values of K in the fit. For the bias these are the K whose interval lies below 0."""
    slope: Estimate


class Diagnosis(Record):
    """What `diagnose` measured of one sampler."""

    schema_version: int = SCHEMA_VERSION
    sampler: str
    backbone: str
    task: str
    seed: int
    prompts: list[str]
    groups: int
    """Groups of the sampler per prompt."""
    group_size: int
    progress: float
    beta: float
    distances: list[Distance]
    prefix_entropy: list[PrefixEntropy]
    total_variation: TotalVariation
    partition: list[PartitionFunction]
    slopes: list[Slope]
    model_rows: int
    reward_calls: int
    failed_scores: int
    seconds: float
    environment: dict[str, object]
    config: dict[str, object]
    checkpoint: str | None = None
    """Folder of the run whose policy was diagnosed; null for the base model."""
    iteration: int | None = None
    """Iteration of that checkpoint."""


class GradientTrial(Record):
    """One objective's gradient estimates, with one way of drawing rollouts, compared with the gradient that it claims."""

    objective: str
    sampler: str
    rule: str
    """Rule of the first stochastic step; `ode` if there is none."""
    eta: float
    """How much noise that step draws; 0 if there is none."""
    leaves: int
    """K, the number of leaves of a group."""
    steps: int
    """Denoising steps of a rollout."""
    divergence: str | None
    """Name of the divergence that the objective claims to descend; null if it claims none, so that nothing is compared."""
    cosine: Estimate
    """Cosine of the angle between the mean of the estimates and the exact gradient."""
    relative_bias: Estimate
    """Norm of the part of that mean that is orthogonal to the exact gradient, relative to the mean."""
    scale: Estimate
    """Length of the other part, relative to the exact gradient. A loss may have any scale, so 1 is not expected."""
    snr: Estimate
    """Norm of the mean divided by the root mean square of the deviations from it, for one estimate."""
    model_rows: int
    """Model evaluations of one estimate, in the rollout and in the training pass."""

    @property
    def noise(self) -> str:
        """The rule, with its eta unless the rule determines it."""
        return self.rule if self.rule in ("ode", "memoryless") else f"{self.rule} {self.eta:.3g}"


class GradientDiagnosis(Record):
    """The record of `diagnose --gradients`."""

    schema_version: int = SCHEMA_VERSION
    backbone: str
    task: str
    seed: int
    prompts: list[str]
    repetitions: int
    """Number of gradient estimates of each trial."""
    progress: float
    log_prob_reduction: str
    """The reduction of log-densities in the estimates. The exact gradient is that of sums over latent dimensions."""
    trials: list[GradientTrial]
    seconds: float
    environment: dict[str, object]
    configs: dict[str, dict[str, object]]
    """The configuration of each pair `objective x sampler`."""
    checkpoint: str | None = None
    """Folder of the run whose policy was diagnosed; null for the base model."""
    iteration: int | None = None
    """Iteration of that checkpoint."""
