"""Imported last by the fork server: its processes need not look through, and copy, all that it has imported."""

import gc

gc.collect()
gc.freeze()
