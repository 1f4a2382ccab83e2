"""Analyses the records of a comparison: curves, contrasts between methods, and statistical power."""
