"""Backbones. `--backbone` takes the name of a file in this package, or the path of a local diffusers folder."""
