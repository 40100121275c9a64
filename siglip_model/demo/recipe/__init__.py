"""How the demo checkpoint and its pictures were made; not part of the wheel."""
