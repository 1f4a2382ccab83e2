"""Scoring without training: of checkpoints, model folders and images, and scorers over HTTP."""
