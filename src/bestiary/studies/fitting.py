"""Models of equal size: the width of a layout, solved for a number of parameters.

The model's width is a multiple of 32, which is coarse; what is left is made up by the inner width of the layers: the
channel mixer's `d_hidden`, or `expand` where a block has no channel mixer (Mamba). What the user set stays as it is.
"""

from dataclasses import dataclass, replace

from bestiary import channel_mixers, mixers
from bestiary.errors import UsageError
from bestiary.models import LanguageModel, ModelConfig
from bestiary.models.layout import Layer, parse, spell

WIDEST = 8192


@dataclass(frozen=True)
class Knob:
    """An inner width that may be turned: which layer, which option, its default in units, parameters a unit."""

    layer: int
    option: str
    units: int
    unit: int
    parameters: float


def fit(layout: str, parameters: int, *, vocab_size: int = 256) -> ModelConfig:
    """The configuration of `layout` with as nearly `parameters` parameters as its widths allow.

    Raises:
        UsageError: the smallest or the widest model is still more than a factor of two away.
    """
    sizes = {
        d_model: count(ModelConfig(layout, d_model, vocab_size)) for d_model in _widths(layout, parameters, vocab_size)
    }
    near = [d_model for d_model in sizes if 0.5 <= sizes[d_model] / parameters <= 2]
    closest = min(near or sizes, key=lambda d_model: abs(sizes[d_model] - parameters))
    if not near:
        raise UsageError(
            f"layout {layout!r} has {sizes[closest]:,} parameters at width {closest}, far from {parameters:,}: "
            "take more or fewer layers, or another number of parameters"
        )
    config = ModelConfig(layout, closest, vocab_size)
    return _turn(config, _knobs(config), parameters)


def count(config: ModelConfig) -> int:
    """Parameters of the model, each counted once."""
    return LanguageModel(config).n_parameters()


def _widths(layout: str, parameters: int, vocab_size: int) -> list[int]:
    """The widths just below and just above the target, by doubling and halving."""
    low, high = 32, 64
    while high < WIDEST and count(ModelConfig(layout, high, vocab_size)) < parameters:
        low, high = high, 2 * high
    while high - low > 32:
        middle = (low + high) // 64 * 32
        low, high = (middle, high) if count(ModelConfig(layout, middle, vocab_size)) < parameters else (low, middle)
    return [low, high]


def _knobs(config: ModelConfig) -> list[Knob]:
    knobs = []
    for i, layer in enumerate(config.layers):
        if layer.share is not None:  # layers that share weights would have to turn together
            continue
        option = "expand" if layer.channel is None else "d_hidden"
        if option == "expand" and _expanding(layer) is None:
            continue
        if option == "d_hidden" and (
            option in layer.channel_options or option not in channel_mixers.options(str(layer.channel))
        ):
            continue
        knob = _knob(config, i, option)
        if knob is not None:
            knobs.append(knob)
    return knobs


def _expanding(layer: Layer) -> int | None:
    """The first part of a layer whose `expand` may be set."""
    for i, part in enumerate(layer.parts):
        if "expand" in mixers.options(part.mixer) and "expand" not in part.options:
            return i
    return None


def _knob(config: ModelConfig, index: int, option: str) -> Knob | None:
    """The knob of one layer, in the finest units that the layer accepts."""
    layer = config.layers[index]
    default = _inner_width(config, layer, option)
    for unit in (8, 16, 32, 64, 128):
        if default % unit:
            continue
        units, sizes = default // unit, []
        try:
            for n in (units, units + 1, units + 2):
                sizes.append(count(replace(config, layout=spell([_set(layer, option, n * unit, config.d_model)]))))
        except UsageError:
            continue  # say, heads that do not divide the width
        one, two = sizes[1] - sizes[0], sizes[2] - sizes[0]
        if 0.4 * two < one < 0.6 * two:  # else the layer rounds to coarser units: Mamba-2 to whole heads
            return Knob(index, option, units, unit, two / 2)
    return None


def _inner_width(config: ModelConfig, layer: Layer, option: str) -> int:
    if option == "expand":
        return round(mixers.options(layer.parts[_expanding(layer) or 0].mixer)["expand"] * config.d_model)
    part = channel_mixers.build(str(layer.channel), config.d_model, **layer.channel_options)
    return part.d_hidden


def _set(layer: Layer, option: str, width: int, d_model: int) -> Layer:
    if option == "expand":
        parts, place = list(layer.parts), _expanding(layer) or 0
        parts[place] = replace(parts[place], options=parts[place].options | {"expand": width / d_model})
        return replace(layer, parts=tuple(parts))
    return replace(layer, channel_options=layer.channel_options | {"d_hidden": width})


def _turn(config: ModelConfig, knobs: list[Knob], parameters: int) -> ModelConfig:
    """Turn all knobs by the same share, and the first ones by a unit more, to come as near as whole units allow."""
    missing = parameters - count(config)
    total = sum(knob.units * knob.parameters for knob in knobs)
    if not knobs or not total:
        return config
    turned = [max(1, int(knob.units * max(0.0, 1 + missing / total))) for knob in knobs]
    left = missing - sum((n - knob.units) * knob.parameters for n, knob in zip(turned, knobs))
    for i, knob in enumerate(knobs):
        if left > knob.parameters / 2:
            turned[i] += 1
            left -= knob.parameters
    layers = list(parse(config.layout))
    for n, knob in zip(turned, knobs):
        if n != knob.units:
            layers[knob.layer] = _set(layers[knob.layer], knob.option, n * knob.unit, config.d_model)
    return replace(config, layout=spell(layers))
