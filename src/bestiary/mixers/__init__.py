"""Sequence mixers: one file each, one contract for all (see base.py)."""

import importlib
import pkgutil

from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.registry import Registry

registry: Registry[type[Mixer]] = Registry("mixer", Mixer)
register, names, build, options, get = (
    registry.register,
    registry.names,
    registry.build,
    registry.options,
    registry.get,
)

for _module in pkgutil.iter_modules(__path__):  # a file in this folder is a mixer that registers itself
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Context", "Mixer", "build", "get", "names", "options", "register", "registry"]
