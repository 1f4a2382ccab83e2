"""Helpers of the tests: toys, plug-ins, independent replays, faults, processes, mutations."""
