"""Detectors of objects and of lettering, and the grammar of prompts about them."""
