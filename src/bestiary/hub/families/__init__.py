"""Published families of models in the layout of Hugging Face's transformers, one file each.

A file registers, for the `model_type`s that it knows, a function from the published config.json to a Recipe.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestiary.errors import BestiaryError, unknown
from bestiary.hub.keys import SAME, Form, Key, affine, same
from bestiary.models import ModelConfig
from bestiary.models.layout import MOST_LAYERS


@dataclass(frozen=True)
class Recipe:
    """What a published model is here.

    Args:
        config: of our model.
        keys: which of its parameters lie in which published tensors.
        tied: published names of a head that is the embedding again, which files may or may not hold.
        ignored: a pattern of published tensors that are no weights but tables.
    """

    config: ModelConfig
    keys: list[Key]
    tied: dict[str, str] = field(default_factory=dict)
    ignored: re.Pattern[str] = re.compile(r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$")


def assemble(
    config: ModelConfig, keys: list[Key], *, embedding: str, norm: str, head: str = "lm_head", norm_form: Form = SAME
) -> Recipe:
    """A recipe from the keys of the blocks and the names of what stands around them."""
    around = [
        *same("embedding", embedding, "weight"),
        *same("norm", norm, *affine(config.norm == "layer"), form=norm_form),
    ]
    if not config.tie_embeddings:
        return Recipe(config, [*around, *same("head", head, "weight"), *keys])
    return Recipe(config, [*around, *keys], {f"{head}.weight": f"{embedding}.weight"})


class Fields:
    """A published config.json: what must be there, and what it may say."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or its default where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A field that is a positive integer."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BestiaryError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value

    def few(self, name: str) -> int:
        """A field that is a number of modules, of which there cannot be very many."""
        count = self.size(name)
        if count > MOST_LAYERS:
            raise BestiaryError(f"config.json: {name}={count} is more than {MOST_LAYERS}")
        return count

    def layers(self) -> int:
        """The number of layers."""
        return self.few("num_hidden_layers")

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise BestiaryError(f"config.json: {name} must be true or false, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number, and finite."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e18:
            raise BestiaryError(f"config.json: {name} must be a number, not {value!r}")
        return float(value)

    def listed(self, name: str, kind: type, default: list[Any], count: int | None = None) -> list[Any]:
        """A field that is a list of words (str) or of layers (int), not empty where a default is given, or as long."""
        value = self.get(name, default)
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
            raise BestiaryError(f"config.json: {name} must be a list of {kind.__name__}, not {value!r}")
        if (default and not value) or (count is not None and len(value) != count):
            raise BestiaryError(f"config.json: {name} has {len(value)} entries, not {count or 'one or more'}")
        return value

    def kinds(
        self, name: str, allowed: Iterable[str], *, count: int | None = None, default: Sequence[str] = ()
    ) -> list[str]:
        """A field that names the kinds of layers, of as many as `count` says."""
        allowed = list(allowed)
        found = self.listed(name, str, list(default), count)
        for kind in found:
            if kind not in allowed:
                raise BestiaryError(f"config.json: {name} {kind!r} is not supported, only {', '.join(allowed)}")
        return found

    def must_be(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A field that may have these values alone, since no other is supported."""
        value = self.get(name, default)
        if value not in allowed:
            raise BestiaryError(
                f"config.json: {name}={value!r} is not supported, only {', '.join(repr(word) for word in allowed)}"
            )
        return value

    def rotary(self, head_dim: int, *, base: float = 10000.0, part: float = 1.0) -> dict[str, Any]:
        """Options of our attention's rotation, from any of the ways to say it: as options that are no defaults."""
        said = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(said, dict):
            raise BestiaryError(f"config.json: rope_parameters must be an object, not {said!r}")
        kind, said = said.get("rope_type", said.get("type", "default")), Fields(said)
        options: dict[str, Any] = {"rotary_base": said.number("rope_theta", self.number("rope_theta", base))}
        part = said.number("partial_rotary_factor", self.number("partial_rotary_factor", part))
        if part != 1:
            options["rotary_dims"] = int(head_dim * part)
        if kind == "linear":
            options["rotary_stretch"] = said.number("factor")
        elif kind != "default":
            raise BestiaryError(f"config.json: rotary positions of type {kind!r} are not supported (default, linear)")
        return options


Reader = Callable[[Fields], Recipe]
_readers: dict[str, Reader] = {}


def family(*model_types: str) -> Callable[[Reader], Reader]:
    """Decorator: this function reads the config.json of models of these types."""

    def add(reader: Reader) -> Reader:
        _readers.update(dict.fromkeys(model_types, reader))
        return reader

    return add


def model_types() -> list[str]:
    """What can be read, sorted."""
    return sorted(_readers)


def recipe(config: dict[str, Any]) -> Recipe:
    """What the model of a published config.json is here.

    Raises:
        BestiaryError: its type is unknown, a field is missing or wrong, or it asks for what is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in _readers:
        raise BestiaryError(str(unknown("model_type", kind, _readers)))
    return _readers[kind](Fields(config))


for _module in pkgutil.iter_modules(__path__):  # a file in this folder registers what it reads
    importlib.import_module(f"{__name__}.{_module.name}")
