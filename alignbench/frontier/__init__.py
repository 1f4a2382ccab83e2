"""The front of the tilted target: how much diversity the tilted base model keeps at each reward, without any training."""

IMAGES = 64
"""Default number of the base model's samples for each prompt."""
BEST_OF = (2, 4, 8, 16)
"""Default values of n for best-of-n."""
