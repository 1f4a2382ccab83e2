"""Diversity metrics on trial: sets of images whose loss of diversity is known, and how well a metric sees it."""
