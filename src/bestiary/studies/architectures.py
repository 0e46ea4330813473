"""The architectures that `compare` takes when it is not told otherwise, as layouts of about four Transformer layers."""

from dataclasses import dataclass, replace
from typing import Any

from bestiary import mixers
from bestiary.errors import UsageError, unknown
from bestiary.models.layout import Layer, parse, spell


@dataclass(frozen=True)
class Architecture:
    """A named layout. `family` is a word for tables; `attends` says whether any layer reads its whole past."""

    name: str
    layout: str
    family: str

    @property
    def attends(self) -> bool:
        parts = [part for layer in parse(self.layout) for part in layer.parts]
        return any(mixers.get(part.mixer).attends and not part.options.get("window") for part in parts)


KNOWN = {
    architecture.name: architecture
    for architecture in (
        Architecture("attention", "attention*4", "Transformer"),
        Architecture("mamba", "mamba*8", "state-space model"),
        Architecture("gla", "gla*4", "gated linear attention"),
        # a quarter linear attention, a quarter window of 64 tokens back, the rest short convolutions, as published
        Architecture("based", "based_conv based attention{window=65} based_conv", "linear attention + window"),
        Architecture("hyena", "hyena*4", "long convolution"),
        Architecture("rwkv4", "rwkv4*4", "linear RNN"),
        Architecture("striped", "(hyena*3 attention)*1", "hybrid: 3 hyena, 1 attention"),
        Architecture("mamba2", "mamba2*8", "state-space model"),
        Architecture("linear_attention", "linear_attention*4", "linear attention"),
        Architecture("retnet", "retnet*4", "linear attention with decay"),
        Architecture("delta_net", "delta_net*4", "delta rule"),
        Architecture("gated_delta_net", "gated_delta_net*4", "gated delta rule"),
        Architecture("s4", "s4*4", "state-space model"),
        Architecture("s4d", "s4d*4", "state-space model"),
        Architecture("h3", "h3*4", "state-space model"),
        Architecture("mla", "mla*4", "Transformer, latent cache"),
        Architecture("mamba3", "mamba3*4", "state-space model"),
        Architecture("s5", "s5*4", "state-space model"),
        Architecture("lru", "lru*4", "linear RNN"),
        Architecture("hgrn", "hgrn*4", "gated linear RNN"),
        Architecture("hgrn2", "hgrn2*4", "gated linear attention"),
        Architecture("rg_lru", "rg_lru*4", "gated linear RNN"),
        Architecture("griffin", "rg_lru*2 attention{window=64, n_kv_heads=1} rg_lru", "hybrid: RG-LRU, window"),
        Architecture("min_gru", "min_gru*4", "gated linear RNN"),
        Architecture("min_lstm", "min_lstm*4", "gated linear RNN"),
        Architecture("rwkv5", "rwkv5*4", "linear attention with decay"),
        Architecture("rwkv6", "rwkv6*4", "gated linear attention"),
        Architecture("rwkv7", "rwkv7*4", "gated delta rule"),
        Architecture("kda", "kda*4", "gated delta rule"),
        Architecture("delta_product", "delta_product*4", "delta rule"),
        Architecture("log_linear_attention", "log_linear_attention*4", "log-linear attention"),
        Architecture("mlstm", "mlstm*8", "xLSTM, matrix memory"),
        Architecture("xlstm_7b", "xlstm_7b*4", "xLSTM 7B, matrix memory"),
        Architecture("slstm", "slstm*4", "recurrent network"),
        Architecture("m2_gpt", "m2_gpt*4", "long convolution, Monarch MLP"),
        Architecture("striped_hyena", "(striped_hyena attention)*2", "hybrid: modal convolution, attention"),
        Architecture("striped_hyena2", "hyena_se hyena_mr hyena_li attention", "hybrid: convolutions, attention"),
        Architecture("lfm2", "gated_conv*3 attention", "hybrid: short convolution, attention"),
        Architecture("hymba", "(attention{window=64}+mamba)*4", "hybrid, side by side"),
        Architecture("zamba", "(mamba*3 zamba_attention{share=a})*2", "hybrid: mamba, shared attention"),
        Architecture("lstm", "lstm*4", "recurrent network"),
        Architecture("gru", "gru*4", "recurrent network"),
        Architecture("mamba_attention", "(mamba*3 attention)*2", "hybrid: 3 mamba, 1 attention"),
    )
}
RECALL_WINDOW = 16
"""The longest window of attention in a recall probe, whose queries come up to 62 tokens after their pair."""
DEFAULT = ("attention", "mamba", "gla", "based", "hyena", "rwkv4", "striped")


def find(arch: str) -> Architecture:
    """An architecture by name, or any layout as one of its own.

    Raises:
        UsageError: neither a known name nor a layout.
    """
    if arch in KNOWN:
        return KNOWN[arch]
    if arch in mixers.names():
        return Architecture(arch, f"{arch}*4", "your mixer")
    if arch.isidentifier():
        raise unknown("architecture or mixer", arch, {*KNOWN, *mixers.names()})
    layers = parse(arch)
    kinds = sorted({layer.mixer for layer in layers})
    return Architecture(arch, arch, "layout of " + ", ".join(kinds))


def find_all(archs: tuple[str, ...]) -> list[Architecture]:
    """Several architectures, each once, in order."""
    found = [find(arch) for arch in archs or DEFAULT]
    names = [architecture.name for architecture in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"architecture {name!r} is given twice")
    return found


def recall_layout(layout: str) -> str:
    """The recall probe's layout: a short convolution, then each different layer of the layout once, none with an MLP.

    So it is done in Zoology: all mixers get the convolution that compares neighbours, and differ in what they remember.
    Windows of attention shrink to RECALL_WINDOW: one as long as the probe's sequences would be full attention.
    """
    bare = [_bare(layer) for layer in parse(layout) if layer.mixer != "based_conv"]
    different = [layer for i, layer in enumerate(bare) if layer not in bare[:i]]
    return spell([_bare(parse("based_conv")[0]), *different])


def _bare(layer: Layer) -> Layer:
    """The layer without its channel mixer, its windows cut."""
    parts = tuple(replace(part, options=_cut(part.options)) for part in layer.parts)
    return Layer(parts, join=layer.join)


def _cut(options: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in options.items() if key != "expand"}  # `expand` only fitted the size
    if window := kept.get("window"):
        kept["window"] = min(int(window), RECALL_WINDOW)
    return kept
