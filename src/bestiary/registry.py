"""Names for interchangeable parts: sequence mixers and channel mixers, each a class in one file."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from bestiary.errors import UsageError, unknown

C = TypeVar("C", bound=type)
CONTEXT = ("layer_index", "n_layers", "residuals")  # what the model tells a part about its place; not for the user


class Registry(Generic[C]):
    """A table from names to classes that build from `d_model` and keyword options.

    Args:
        kind: what the parts are called in messages, e.g. "mixer".
        base: the class that every part must derive from.
    """

    def __init__(self, kind: str, base: C):
        self.kind, self.base = kind, base
        self._classes: dict[str, C] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: makes the class available under `name`.

        Raises UsageError if the class does not derive from the base or the name is taken by another class.
        """

        def add(cls: C) -> C:
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise UsageError(f"{self.kind} {name!r} must derive from {self.base.__name__}")
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UsageError(f"{self.kind} {name!r} exists already: {known.__module__}.{known.__qualname__}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._classes)

    def get(self, name: str) -> C:
        """The class behind a name; an unknown one is a UsageError that lists the valid names."""
        if name not in self._classes:
            raise unknown(self.kind, name, self._classes)
        return self._classes[name]

    def options(self, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Options of a part and their defaults (inspect.Parameter.empty where there is none).

        A part around another, whose name its option `wraps` holds, takes the other's options too: those of the one
        that `given` names, or of the default.
        """
        cls = self.get(name)
        parameters = list(inspect.signature(cls).parameters.values())[1:]  # after d_model
        own = {p.name: p.default for p in parameters if p.name not in CONTEXT and p.kind is not p.VAR_KEYWORD}
        wraps = getattr(cls, "wraps", None)
        if wraps is None:
            return own
        inner = str((given or {}).get(wraps, own[wraps]))
        return own | {key: default for key, default in self.options(inner).items() if key not in own}

    def build(
        self,
        name: str,
        d_model: int,
        *,
        layer_index: int = 0,
        n_layers: int = 1,
        residuals: int = 1,
        **options: Any,
    ) -> Any:
        """Build a part. Its place in a model reaches those whose initialisation depends on depth: `layer_index` of
        `n_layers`, and `residuals`, how many parts in all write into the residual path.

        Raises:
            UsageError: an unknown name or option (the message lists the valid ones), or a bad value.
        """
        cls, valid = self.get(name), self.options(name, options)
        for option in options:
            if option not in valid:
                raise unknown(f"option of {self.kind} {name!r}:", option, valid)
        accepted = inspect.signature(cls).parameters
        place = {"layer_index": layer_index, "n_layers": n_layers, "residuals": residuals}
        try:
            return cls(d_model, **options, **{key: value for key, value in place.items() if key in accepted})
        except UsageError:
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.kind} {name!r} with {options or 'its defaults'}: {error}") from error

    def load(self, spec: str) -> str:
        """Import a user's own part given as `module:Class`, register it under its class name, and return that name.

        A plain registered name is returned as it is.
        """
        if ":" not in spec:
            self.get(spec)
            return spec
        module_name, _, class_name = spec.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"cannot import {self.kind} {spec!r}: {error}") from error
        for name, known in self._classes.items():
            if known is cls:
                return name
        self.register(class_name)(cls)
        return class_name
