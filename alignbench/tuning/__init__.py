"""Equal tuning: the same number of trials for each method, on seeds and prompts that no comparison uses."""

LR_FACTOR = 10.0
"""By default, trials take learning rates from the preset's divided by this to the preset's times this."""
UPDATES = (1, 2, 4)
"""Values of `updates_per_rollout` that trials take by default."""
TRIALS = 8
"""Trials of each method by default."""
