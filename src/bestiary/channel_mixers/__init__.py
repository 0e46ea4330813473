"""Channel mixers: what follows a sequence mixer in a block; the same contract, most of them without a state."""

import importlib
import pkgutil

from bestiary.mixers.base import Mixer
from bestiary.registry import Registry

registry: Registry[type[Mixer]] = Registry("channel mixer", Mixer)
register, names, build, options, get = (
    registry.register,
    registry.names,
    registry.build,
    registry.options,
    registry.get,
)

for _module in pkgutil.iter_modules(__path__):  # a file in this folder is a channel mixer that registers itself
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Mixer", "build", "get", "names", "options", "register", "registry"]
