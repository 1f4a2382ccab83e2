"""The target's own front: how much diversity the tilted base model keeps at each reward, without any training."""

IMAGES = 64
"""Samples of the base model for each prompt, by default."""
BEST_OF = (2, 4, 8, 16)
"""Values of n for best-of-n, by default."""
