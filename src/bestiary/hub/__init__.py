"""Reading and writing models: Bestiary's own format."""

from bestiary.hub.native import load, save

__all__ = ["load", "save"]
