"""Keepers of diversity beside any objective: bonuses in the reward, a choice of images to train on, and a term on data."""
