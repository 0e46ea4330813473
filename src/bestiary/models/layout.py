"""The layout grammar: one line that says which mixer each layer has.

    layout  = item+                         items are separated by spaces
    item    = (layer | "(" layout ")") ("*" count)?
    layer   = part ("+" part)*
    part    = name options?
    options = "{" key=value ("," key=value)* "}"

    "mamba*24"                              24 Mamba layers
    "(hyena*3 attention)*8"                 32 layers, every fourth of them attention
    "attention{window=64, n_heads=4}*2"     options are the mixer's keyword arguments
    "gla{channel=gelu_mlp}*4"               another channel mixer than the mixer's default; channel=none for none at all
    "gla{channel.d_hidden=512}*4"           options of the channel mixer
    "(attention{window=64}+mamba)*12"       mixers side by side in one layer; join=sum adds what they say as it is
    "(mamba*5 attention{share=a})*4"        layers that share a name share their weights, each with a state of its own

Values are integers, floats, true, false, none, or words.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bestiary import channel_mixers, mixers
from bestiary.errors import UsageError, unknown
from bestiary.mixers.parallel import JOINS, Parallel

MOST_LAYERS = 4096
TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][\w.]*)|(?P<number>\d+)|(?P<options>\{[^{}]*\})|(?P<sign>[()*+]))")
LAYER_OPTIONS = ("channel", "share", "join")  # of a layer as a whole, wherever among its parts they stand


@dataclass(frozen=True)
class Part:
    """A sequence mixer and its options."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        parts: its sequence mixers, side by side where there are several.
        channel, channel_options: the channel mixer (None: the layer has none).
        share: layers of the same name here use the same weights.
        join: how several parts are joined; see bestiary.mixers.parallel.
    """

    parts: tuple[Part, ...]
    channel: str | None = None
    channel_options: dict[str, Any] = field(default_factory=dict)
    share: str | None = None
    join: str = JOINS[0]

    @property
    def mixer(self) -> str:
        """The mixers' names, joined by "+"."""
        return "+".join(part.mixer for part in self.parts)

    def build_mixer(self, d_model: int, **place: int) -> mixers.Mixer:
        """The sequence mixing of the layer; `place` as in `bestiary.mixers.build`."""
        parts = [mixers.build(part.mixer, d_model, **place, **part.options) for part in self.parts]
        return parts[0] if len(parts) == 1 else Parallel(parts, self.join)

    def build_channel(self, d_model: int, **place: int) -> mixers.Mixer | None:
        """The channel mixer of the layer, if it has one."""
        if self.channel is None:
            return None
        return channel_mixers.build(self.channel, d_model, **place, **self.channel_options)


def build_blocks(layers: list[Layer], make: Callable[..., nn.Module], *, residuals: int | None = None) -> nn.ModuleList:
    """A block a layer, made by `make(layer, layer_index=, n_layers=, residuals=)`; one for all that share a name.

    Args:
        residuals: how many parts write into the residual path; by default all mixers and channel mixers.
    """
    count = sum(1 + (layer.channel is not None) for layer in layers) if residuals is None else residuals
    blocks, shared = nn.ModuleList(), dict[str | None, nn.Module]()
    for i, layer in enumerate(layers):
        block = shared.get(layer.share) or make(layer, layer_index=i, n_layers=len(layers), residuals=count)
        blocks.append(block)
        if layer.share is not None:
            shared[layer.share] = block
    return blocks


def parse(layout: str) -> list[Layer]:
    """The layers of a layout, in order.

    Raises:
        UsageError: where the grammar is broken (with the position), or a name or option does not exist (with the
            valid ones).
    """
    tokens = _tokens(layout)
    layers, rest = _sequence(tokens, layout)
    if rest:
        raise _broken(layout, rest[0], "unmatched ')'")
    if not layers:
        raise UsageError("the layout is empty; try 'mamba*4'")
    shared: dict[str, Layer] = {}
    for layer in layers:
        if layer.share is not None and shared.setdefault(layer.share, layer) != layer:
            raise UsageError(f"layers that share the name {layer.share!r} must be alike in all their options")
    return layers


def spell(layers: list[Layer]) -> str:
    """The layout string of some layers; the inverse of `parse`, equal neighbours written with a count."""
    words = [_word(layer) for layer in layers]
    runs = [(word, len(list(group))) for word, group in itertools.groupby(words)]
    return " ".join(word if count == 1 else f"{word}*{count}" for word, count in runs)


def _word(layer: Layer) -> str:
    whole: dict[str, Any] = {}
    if layer.channel != _default_channel(layer.parts):
        whole["channel"] = layer.channel
    whole |= {f"channel.{key}": value for key, value in layer.channel_options.items()}
    if layer.share is not None:
        whole["share"] = layer.share
    if layer.join != JOINS[0]:
        whole["join"] = layer.join
    first, *others = layer.parts
    return "+".join([_spell(first.mixer, first.options | whole), *(_spell(p.mixer, p.options) for p in others)])


def _spell(name: str, options: dict[str, Any]) -> str:
    text = ", ".join(
        f"{key}={str(value).lower() if value in (True, False, None) else value}" for key, value in options.items()
    )
    return f"{name}{{{text}}}" if text else name


_Token = tuple[str, str, int]  # kind, text, position


def _tokens(layout: str) -> list[_Token]:
    found, position = [], 0
    end = len(layout.rstrip())
    while position < end:
        match = TOKEN.match(layout, position)
        if match is None:
            raise _broken(
                layout, ("", "", position + len(layout[position:]) - len(layout[position:].lstrip())), "unexpected"
            )
        kind = str(match.lastgroup)
        found.append((kind, match[kind], match.start(kind)))
        position = match.end()
    return found


def _sequence(tokens: list[_Token], layout: str, depth: int = 0) -> tuple[list[Layer], list[_Token]]:
    """Layers up to a closing parenthesis or the end, and the tokens from there on."""
    if depth > 50:
        raise UsageError("the layout nests more than 50 parentheses deep")
    layers: list[Layer] = []
    while tokens and tokens[0][1] != ")":
        kind, text, _ = tokens[0]
        if text == "(":
            group, rest = _sequence(tokens[1:], layout, depth + 1)
            if not rest:
                raise _broken(layout, tokens[0], "this '(' is never closed")
            tokens = rest[1:]
        elif kind == "word":
            group, tokens = _layer(tokens, layout)
        else:
            raise _broken(layout, tokens[0], "expected a mixer's name or '('")
        if tokens and tokens[0][1] == "+":
            raise _broken(layout, tokens[0], "'+' joins two mixers, not groups")
        if tokens and tokens[0][1] == "*":
            if len(tokens) < 2 or tokens[1][0] != "number":
                raise _broken(layout, tokens[0], "'*' wants a count")
            count, tokens = int(tokens[1][1]), tokens[2:]
            if len(group) * count > MOST_LAYERS:
                raise UsageError(f"the layout has more than {MOST_LAYERS} layers")
            group = group * count
        layers += group
        if len(layers) > MOST_LAYERS:
            raise UsageError(f"the layout has more than {MOST_LAYERS} layers")
    return layers, tokens


def _layer(tokens: list[_Token], layout: str) -> tuple[list[Layer], list[_Token]]:
    """One layer, of one part or of several with "+" between them, and the tokens after it."""
    parts: list[Part] = []
    whole: dict[str, Any] = {}
    while True:
        name, tokens = tokens[0][1], tokens[1:]
        options: dict[str, Any] = {}
        if tokens and tokens[0][0] == "options":
            options, tokens = _options(tokens[0], layout), tokens[1:]
        parts.append(_part(name, options, whole))
        if not tokens or tokens[0][1] != "+":
            return [_assemble(tuple(parts), whole)], tokens
        if len(tokens) < 2 or tokens[1][0] != "word":
            raise _broken(layout, tokens[0], "'+' wants a mixer on both sides")
        tokens = tokens[1:]


def _options(token: _Token, layout: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for entry in filter(None, (entry.strip() for entry in token[1][1:-1].split(","))):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key or not value:
            raise _broken(layout, token, f"options are written {{key=value, ...}}, not {entry!r}")
        if key in options:
            raise _broken(layout, token, f"option {key!r} is given twice")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _part(name: str, options: dict[str, Any], whole: dict[str, Any]) -> Part:
    """A mixer with the options that are its own, all of which must exist; the layer's go into `whole`."""
    own = {key: value for key, value in options.items() if not _of_the_layer(key)}
    valid = mixers.options(name, own)
    for key in own:
        if key not in valid:
            raise unknown(f"option of mixer {name!r}:", key, [*valid, *LAYER_OPTIONS])
    for key in options.keys() - own.keys():
        if key in whole:
            raise UsageError(f"option {key!r} of a layer is given twice, at two of its mixers")
        whole[key] = options[key]
    return Part(name, own)


def _of_the_layer(option: str) -> bool:
    return option in LAYER_OPTIONS or option.startswith("channel.")


def _assemble(parts: tuple[Part, ...], whole: dict[str, Any]) -> Layer:
    channel = whole.get("channel", _default_channel(parts))
    inner = {key.removeprefix("channel."): value for key, value in whole.items() if key.startswith("channel.")}
    names = "+".join(part.mixer for part in parts)
    if channel is None and inner:
        raise UsageError(
            f"mixer {names!r} has no channel mixer here, so {sorted(inner)} cannot be set; add channel=NAME"
        )
    if channel is not None:
        valid = channel_mixers.options(str(channel))
        for key in inner:
            if key not in valid:
                raise unknown(f"option of channel mixer {channel!r}:", key, valid)
    join, share = whole.get("join", JOINS[0]), whole.get("share")
    if join not in JOINS:
        raise unknown("join", str(join), JOINS)
    if "join" in whole and len(parts) == 1:
        raise UsageError(f"mixer {names!r} stands alone: join is for mixers side by side, as in attention+mamba")
    return Layer(parts, channel, inner, None if share is None else str(share), join)


def _default_channel(parts: tuple[Part, ...]) -> str | None:
    """The channel mixer that the first of the mixers wants, if any of them wants one."""
    return next(filter(None, (mixers.get(part.mixer).channel_mixer for part in parts)), None)


def _broken(layout: str, token: _Token, reason: str) -> UsageError:
    position = token[2]
    return UsageError(f"layout {layout!r}: {reason} at {layout[position : position + 12]!r} (character {position + 1})")
