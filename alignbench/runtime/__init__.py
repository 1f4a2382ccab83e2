"""The process and its surroundings: ranks, signals, streams, memory, the import path, environment variables."""
