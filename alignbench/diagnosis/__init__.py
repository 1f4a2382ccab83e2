"""Diagnoses: the effect of shared steps on a sampler's groups, and gradient estimates against the exact gradient."""
