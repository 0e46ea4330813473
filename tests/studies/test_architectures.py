"""Named architectures are layouts, layouts are architectures, and recall probes are what is left of them."""

import pytest

from bestiary import LanguageModel, ModelConfig
from bestiary.errors import UsageError
from bestiary.models.layout import parse
from bestiary.studies.architectures import DEFAULT, KNOWN, RECALL_WINDOW, find, find_all, recall_layout
from bestiary.studies.fitting import fit
from bestiary.studies.mqar import Recall


@pytest.mark.parametrize("name", KNOWN)
def test_the_recall_probe_of_a_known_architecture_runs_and_learns(name: str) -> None:
    recall = Recall()
    for layout in (KNOWN[name].layout, fit(KNOWN[name].layout, 250_000).layout):
        model = LanguageModel(ModelConfig(recall_layout(layout), 64, recall.vocab_size, norm="layer"))
        tokens, _, _ = recall.batch(3, seed=0)
        logits, _ = model(tokens)
        assert logits.shape == (3, recall.length, recall.vocab_size) and logits.isfinite().all()
        logits.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_a_recall_probe_is_a_convolution_and_each_mixer_once_without_mlps(name: str) -> None:
    first, *rest = parse(recall_layout(KNOWN[name].layout))
    assert first.mixer == "based_conv" and first.channel is None
    assert {layer.mixer for layer in rest} == {layer.mixer for layer in parse(KNOWN[name].layout)} - {"based_conv"}
    assert len(rest) == len({layer.mixer for layer in rest})
    assert all(layer.channel is None and not layer.channel_options for layer in rest)


def test_a_fitted_layout_has_the_recall_probe_of_its_own_architecture() -> None:
    for architecture in KNOWN.values():
        assert recall_layout(fit(architecture.layout, 300_000).layout) == recall_layout(architecture.layout)


def test_windows_are_cut_and_short_or_absent_ones_are_not() -> None:
    windows = [
        layer.parts[0].options.get("window")
        for layer in parse(recall_layout("attention{window=65} attention{window=8} attention"))
    ]
    assert windows == [None, RECALL_WINDOW, 8, None]
    merged = parse(recall_layout("attention{window=65} attention{window=600}"))
    assert len(merged) == 2  # both are the same now


def test_the_options_of_a_mixer_reach_its_probe() -> None:
    asked = parse("mamba{d_state=32, expand=3} s4d{init=inv} attention{rotary=false, window=none} based_conv*2")
    layout = recall_layout(
        "mamba{d_state=32, expand=3} s4d{init=inv} attention{rotary=false, window=none} based_conv*2"
    )
    probe = parse(layout)[1:]
    options = [layer.parts[0].options for layer in probe]
    assert options == [{"d_state": 32}, asked[1].parts[0].options, asked[2].parts[0].options]
    LanguageModel(ModelConfig(layout, 64))


def test_a_layout_of_short_convolutions_alone_is_probed_as_one() -> None:
    assert [layer.mixer for layer in parse(recall_layout("based_conv*3"))] == ["based_conv"]


def test_attending_means_reading_the_whole_past() -> None:
    attending = {name for name, architecture in KNOWN.items() if architecture.attends}
    hybrids = {"striped", "mamba_attention", "striped_hyena", "striped_hyena2", "lfm2", "zamba"}
    assert attending == {"attention", "mla"} | hybrids
    assert find("gla attention{window=none}").attends and not find("gla attention{window=9}").attends


def test_a_layout_is_an_architecture_of_its_own() -> None:
    found = find("(mamba*2 attention)*2")
    assert found.name == found.layout == "(mamba*2 attention)*2" and found.family == "layout of attention, mamba"


def test_none_asked_for_is_the_default_selection_in_its_order() -> None:
    assert tuple(architecture.name for architecture in find_all(())) == DEFAULT
    assert [architecture.name for architecture in find_all(("gru*2", "mamba"))] == ["gru*2", "mamba"]


@pytest.mark.parametrize("arch", ["mambo", "mambo*4"])
def test_an_unknown_name_is_an_error_that_knows_what_was_meant(arch: str) -> None:
    with pytest.raises(UsageError, match=r"'mambo' \(did you mean 'mamba'\?\)"):
        find_all(("gru", arch))


@pytest.mark.parametrize("arch", [("mamba", "gru", "mamba"), ("gru*2", "gru*2")])
def test_an_architecture_given_twice_is_an_error(arch: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="twice"):
        find_all(arch)


def test_all_known_layouts_are_about_four_transformer_layers_deep() -> None:
    for name, architecture in KNOWN.items():
        layers = parse(architecture.layout)
        assert sum(1 if layer.channel else 0.5 for layer in layers) in (4, 5), name
