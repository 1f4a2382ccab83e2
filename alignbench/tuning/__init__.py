"""Equal tuning: the same number of trials for each method, on seeds and prompts that no comparison uses."""

LR_FACTOR = 10.0
"""Default range of learning rates: from the preset's divided by this factor to the preset's times this factor."""
UPDATES = (1, 2, 4)
"""Default values of `updates_per_rollout`."""
TRIALS = 8
"""Default number of trials of each method."""
