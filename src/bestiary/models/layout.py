"""The layout grammar: one line that says which mixer each layer has.

    layout  = item+                         items are separated by spaces
    item    = (name options? | "(" layout ")") ("*" count)?
    options = "{" key=value ("," key=value)* "}"

    "mamba*24"                              24 Mamba layers
    "(hyena*3 attention)*8"                 32 layers, every fourth of them attention
    "attention{window=64, n_heads=4}*2"     options are the mixer's keyword arguments
    "gla{channel=gelu_mlp}*4"               another channel mixer than the mixer's default; channel=none for none at all
    "gla{channel.d_hidden=512}*4"           options of the channel mixer

Values are integers, floats, true, false, none, or words.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from bestiary import channel_mixers, mixers
from bestiary.errors import UsageError, unknown

MOST_LAYERS = 4096
TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][\w.]*)|(?P<number>\d+)|(?P<options>\{[^{}]*\})|(?P<sign>[()*]))")


@dataclass(frozen=True)
class Layer:
    """One layer: a sequence mixer and a channel mixer (None: the layer has none), each with its options."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    channel: str | None = None
    channel_options: dict[str, Any] = field(default_factory=dict)


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
    return layers


def spell(layers: list[Layer]) -> str:
    """The layout string of some layers; the inverse of `parse`, equal neighbours written with a count."""
    words = [_word(layer) for layer in layers]
    runs = [(word, len(list(group))) for word, group in itertools.groupby(words)]
    return " ".join(word if count == 1 else f"{word}*{count}" for word, count in runs)


def _word(layer: Layer) -> str:
    options = dict(layer.options)
    if layer.channel != mixers.get(layer.mixer).channel_mixer:
        options["channel"] = layer.channel
    options |= {f"channel.{key}": value for key, value in layer.channel_options.items()}
    text = ", ".join(
        f"{key}={str(value).lower() if value in (True, False, None) else value}" for key, value in options.items()
    )
    return f"{layer.mixer}{{{text}}}" if text else layer.mixer


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
            options, tokens = {}, tokens[1:]
            if tokens and tokens[0][0] == "options":
                options, tokens = _options(tokens[0], layout), tokens[1:]
            group = [_layer(text, options)]
        else:
            raise _broken(layout, tokens[0], "expected a mixer's name or '('")
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


def _layer(name: str, options: dict[str, Any]) -> Layer:
    """Sort a layer's options into the sequence mixer's and the channel mixer's; every name must exist."""
    cls = mixers.get(name)
    own = {key: value for key, value in options.items() if key != "channel" and not key.startswith("channel.")}
    valid = mixers.options(name, own)
    for key in own:
        if key not in valid:
            raise unknown(f"option of mixer {name!r}:", key, [*valid, "channel"])
    channel = options.get("channel", cls.channel_mixer)
    inner = {key.removeprefix("channel."): value for key, value in options.items() if key.startswith("channel.")}
    if channel is None and inner:
        raise UsageError(
            f"mixer {name!r} has no channel mixer here, so {sorted(inner)} cannot be set; add channel=NAME"
        )
    if channel is not None:
        for key in inner:
            if key not in channel_mixers.options(str(channel)):
                raise unknown(f"option of channel mixer {channel!r}:", key, channel_mixers.options(str(channel)))
        channel_mixers.get(str(channel))
    return Layer(name, own, channel, inner)


def _broken(layout: str, token: _Token, reason: str) -> UsageError:
    position = token[2]
    return UsageError(f"layout {layout!r}: {reason} at {layout[position : position + 12]!r} (character {position + 1})")
