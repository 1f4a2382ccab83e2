"""Estimates what a run will cost before it runs: model rows, memory and time (`--dry-run`)."""
