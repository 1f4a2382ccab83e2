"""Training: collect a rollout, update the policy, keep checkpoints, and the run around it."""
