"""Alignment objectives: a file's name is the name that `--objective` takes. Drop a file in, and it is found."""
