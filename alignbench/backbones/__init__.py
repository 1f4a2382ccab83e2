"""Backbones: a file's name is the name that `--backbone` takes; a path opens a local diffusers folder."""
