"""Tools for authors of plug-ins: templates, checks and descriptions."""
