"""Reads and writes files: one module for each kind, with limits on size, and with atomic writes."""
