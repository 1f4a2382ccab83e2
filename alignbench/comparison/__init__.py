"""Comparisons: grids of runs under one budget, how they are run, and their records as tables."""
