"""Scoring without training: checkpoints, folders, images, and scorers over HTTP."""
