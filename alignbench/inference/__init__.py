"""Methods that act when images are drawn and need no training: best-of-n, steering, and interpolation with the base model."""
