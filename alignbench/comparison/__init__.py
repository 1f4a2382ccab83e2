"""Comparisons: grids of runs under one budget, and studies of many of them."""
