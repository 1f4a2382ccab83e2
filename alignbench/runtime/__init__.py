"""The process and its environment: ranks, signals, streams, memory, the import path and environment variables."""
