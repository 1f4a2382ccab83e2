"""Diagnosis of a sampler: what shared steps do to a group."""
