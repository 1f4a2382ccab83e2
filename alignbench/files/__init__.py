"""How files come in and go out: each kind by one door, with limits, whole or not at all."""
