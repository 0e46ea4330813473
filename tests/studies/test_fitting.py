"""Any layout gets the size it is asked for, by its free widths alone."""

import pytest
import torch

from bestiary import LanguageModel, ModelConfig
from bestiary.errors import UsageError
from bestiary.models.layout import parse, spell
from bestiary.studies.architectures import KNOWN
from bestiary.studies.fitting import count, fit

ODD = (
    "gru",
    "hyena*1",
    "mamba2*7 gru",
    "(mamba2*3 attention{window=32})*2",
    "mamba2{head_dim=64}*6",  # whole heads of 64 channels
    "mamba{channel=swiglu}*4",
    "mamba mamba{expand=1.5}*3",
    "gla{channel=gelu_mlp}*4",
    "gla{channel=rwkv_channel_mix}*3",
    "attention{channel=none}*2 gla*2",
    "attention{n_heads=1}*3",
    "(hyena (gla rwkv4)*2)*2",
)


def within_two_percent(config: ModelConfig, parameters: int) -> bool:
    return abs(count(config) / parameters - 1) < 0.02


@pytest.mark.parametrize("layout", [*(architecture.layout for architecture in KNOWN.values()), *ODD])
def test_a_layout_is_fitted_within_two_percent(layout: str) -> None:
    config = fit(layout, 250_000)
    assert within_two_percent(config, 250_000), f"{count(config):,} parameters: {config.layout}"
    assert [layer.mixer for layer in config.layers] == [layer.mixer for layer in parse(layout)]


@pytest.mark.parametrize("name", ["attention", "mamba", "mamba2", "based", "rwkv4", "s4d", "mamba_attention"])
@pytest.mark.parametrize("parameters", [150_000, 1_000_000, 2_500_000])
def test_other_sizes_are_fitted_too(name: str, parameters: int) -> None:
    config = fit(KNOWN[name].layout, parameters)
    assert within_two_percent(config, parameters), f"{count(config):,} parameters: {config.layout}"


def test_the_vocabulary_counts() -> None:
    config = fit("gla*4", 1_000_000, vocab_size=4096)
    assert config.vocab_size == 4096 and within_two_percent(config, 1_000_000)
    assert config.d_model < fit("gla*4", 1_000_000).d_model  # the embedding takes its share


def test_a_count_is_of_each_parameter_once() -> None:
    model = LanguageModel(ModelConfig("gru", 32))
    assert count(model.config) == len(torch.cat([parameter.flatten() for parameter in model.parameters()]))


@pytest.mark.parametrize(
    "layout",
    [
        "attention{window=32, channel.d_hidden=96} gla*3",
        "mamba{expand=1.5, d_state=8}*2 mamba*4",
        "attention{channel=none}*2 gla*2",
        "gla{channel=gelu_mlp, channel.d_hidden=200} gla{channel=gelu_mlp}*2",
        "mamba{channel=swiglu, channel.d_hidden=64}*2 mamba{channel=swiglu}*2",
    ],
)
def test_what_the_user_set_stays_as_it_is(layout: str) -> None:
    config = fit(layout, 250_000)
    assert within_two_percent(config, 250_000)
    for asked, found in zip(parse(layout), config.layers):
        assert found.channel == asked.channel
        assert asked.parts[0].options.items() <= found.parts[0].options.items()
        assert asked.channel_options.items() <= found.channel_options.items()


@pytest.mark.parametrize("layout", ["attention{channel=none}*4", "gla{channel.d_hidden=300}*4", "mamba{expand=1}*8"])
def test_where_all_inner_widths_are_set_the_nearest_width_is_taken(layout: str) -> None:
    config = fit(layout, 250_000)
    assert config.layout == layout
    off = {d_model: abs(count(ModelConfig(layout, d_model)) - 250_000) for d_model in range(32, 257, 32)}
    assert off[config.d_model] == min(off.values())


@pytest.mark.parametrize("layout", ["mamba*100", "gla*4 mamba{expand=100}*2"])
def test_a_layout_that_cannot_fit_is_refused_with_its_size(layout: str) -> None:
    with pytest.raises(UsageError, match=r"[\d,]+ parameters at width 32, far from 250,000"):
        fit(layout, 250_000)


def test_a_broken_layout_or_option_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'mamba'"):
        fit("mambo*4", 250_000)
    with pytest.raises(UsageError, match="windw"):
        fit("attention{windw=3}", 250_000)


@pytest.mark.parametrize("layout", [*(architecture.layout for architecture in KNOWN.values()), *ODD])
def test_a_fitted_layout_is_spelt_and_parsed_back(layout: str) -> None:
    config = fit(layout, 250_000)
    assert parse(spell(config.layers)) == config.layers
    assert spell(parse(config.layout)) == config.layout


def test_rounding_never_cuts_a_channel_off_an_inner_width() -> None:
    assert int(488 / 224 * 224) == 487  # so it would be cut
    wanted = ModelConfig("mamba{expand=2.17858}*4", 224)
    assert [block.mixer.d_inner for block in LanguageModel(wanted).blocks] == [488] * 4
    found = fit("mamba*4", count(wanted))
    assert found.d_model == 224 and [block.mixer.d_inner for block in LanguageModel(found).blocks] == [488] * 4


def test_a_fit_is_a_function_of_its_arguments() -> None:
    assert fit("(mamba2*3 attention)*1", 300_000) == fit("(mamba2*3 attention)*1", 300_000)
