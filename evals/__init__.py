"""Scorers and set metrics. The name of a file is the name that tasks and `--evals` take; a new file needs no registration."""
