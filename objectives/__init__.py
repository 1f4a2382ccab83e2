"""Alignment objectives. The name of a file is the name that `--objective` takes; a new file needs no registration."""
