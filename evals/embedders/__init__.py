"""Image and text encoders: how their weights are found, opened and fed."""
