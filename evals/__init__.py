"""Scorers and metrics: a file's name is the name that tasks and `--evals` take. Drop a file in, and it is found."""
