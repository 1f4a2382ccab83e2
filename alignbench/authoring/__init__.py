"""For authors of plug-ins: templates, and checks of what must hold."""
