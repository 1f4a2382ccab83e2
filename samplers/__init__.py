"""Rollout samplers. The name of a file is the name that `--sampler` takes; a new file needs no registration."""
