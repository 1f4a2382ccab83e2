"""The 2-D toy problem: exact Gaussian mixtures, rewards with a known target, and distributions over training."""
