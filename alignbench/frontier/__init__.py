"""The target's own front: how much diversity the tilted base model keeps at each reward, without any training."""
