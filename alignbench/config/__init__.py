"""Configuration of a run: layers of defaults, preset, file and options, strictly checked."""
