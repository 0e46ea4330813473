import pytest

from bestiary import ModelConfig
from bestiary.errors import UsageError
from bestiary.models.layout import Part, parse, spell


def names(layout: str) -> list[str]:
    return [layer.mixer for layer in parse(layout)]


def test_a_layout_spells_out_its_layers() -> None:
    assert names("mamba*3") == ["mamba"] * 3
    assert names("(hyena*3 attention)*2") == ["hyena", "hyena", "hyena", "attention"] * 2
    assert names(" gla\n((mamba gla)*2 attention) ") == ["gla", "mamba", "gla", "mamba", "gla", "attention"]
    assert names("mamba*0 gla") == ["gla"]


def test_options_go_to_the_mixer_and_to_the_channel_mixer() -> None:
    (layer,) = parse("attention{window=64, rotary=false, channel=gelu_mlp, channel.d_hidden=96}")
    assert layer.parts == (Part("attention", {"window": 64, "rotary": False}),)
    assert (layer.channel, layer.channel_options) == ("gelu_mlp", {"d_hidden": 96})


def test_mixers_side_by_side_are_one_layer() -> None:
    first, second = parse("attention{window=64}+mamba*1 (mamba+gla{channel=gelu_mlp, join=sum})*1")
    assert first.mixer == "attention+mamba" and (first.channel, first.join) == ("swiglu", "norm")
    assert [part.options for part in first.parts] == [{"window": 64}, {}]
    assert (second.channel, second.join) == ("gelu_mlp", "sum")
    assert parse("mamba+mamba2")[0].channel is None


@pytest.mark.parametrize(
    "layout",
    [
        "mamba*3 gla",
        "attention{window=64}+mamba{expand=1.5, join=sum}*2",
        "(mamba*2 attention{n_heads=2, share=a, channel=gelu_mlp, channel.d_hidden=64})*3",
        "gla{channel=none} rwkv4{channel=swiglu}",
    ],
)
def test_a_spelled_layout_parses_to_the_same_layers(layout: str) -> None:
    assert parse(spell(parse(layout))) == parse(layout)


def test_each_mixer_has_the_channel_mixer_it_wants_unless_told_otherwise() -> None:
    assert [layer.channel for layer in parse("mamba gla rwkv4 mamba{channel=swiglu} gla{channel=none}")] == [
        None, "swiglu", "rwkv_channel_mix", "swiglu", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("", "empty"),
        ("mamba*", "wants a count"),
        ("(mamba", "never closed"),
        ("mamba)", "unmatched"),
        ("mamba ? gla", "character 7"),
        ("*3", "expected a mixer"),
        ("mambo*3", "did you mean 'mamba'"),
        ("attention{windw=3}", "did you mean 'window'"),
        ("attention{window}", "key=value"),
        ("attention{window=3,window=4}", "twice"),
        ("gla{channel=swigloo}", "did you mean 'swiglu'"),
        ("gla{channel.hidden=3}", "d_hidden"),
        ("mamba{channel.d_hidden=64}", "no channel mixer"),
        ("mamba*100000", "4096"),
        ("mamba+", "on both sides"),
        ("+mamba", "expected a mixer"),
        ("mamba+(gla)", "on both sides"),
        ("(gla)+mamba", "not groups"),
        ("gla{join=sum}", "stands alone"),
        ("gla{join=product}+mamba", "unknown join 'product'"),
        ("gla{channel=none}+mamba{channel=none}", "twice"),
        ("gla{share=a} mamba gla{share=a, n_heads=2}", "must be alike"),
        ("(" * 100 + "mamba" + ")" * 100, "50"),
    ],
)
def test_a_broken_layout_is_one_clear_line(layout: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(layout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 100),
        ("d_model", 0),
        ("vocab_size", 0),
        ("norm", "batch"),
        ("norm_eps", 0.0),
        ("layout", "x"),
        ("logit_cap", 0.0),
        ("embedding_scale", -1),
    ],
)
def test_a_wrong_field_of_the_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=str(value)):
        ModelConfig(**{field: value})


def test_a_configuration_survives_json() -> None:
    config = ModelConfig("(hyena attention)*2", d_model=64, norm="layer")
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="did you mean 'd_model'"):
        ModelConfig.from_dict({"d_modl": 3})
