"""Detectors of objects and lettering, and the grammar of prompts about them."""
