"""Rollouts: what a sampler plans, the one executor that runs it, and the forest that objectives read."""
