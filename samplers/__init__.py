"""Rollout samplers: a file's name is the name that `--sampler` takes. Drop a file in, and it is found."""
