"""Comparisons: grids of runs under one budget, how they are run, and what their records say together."""
