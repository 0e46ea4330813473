"""Every registered mixer and channel mixer under every law: one test each, ten random cases."""

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bestiary import channel_mixers, mixers
from bestiary.conformance import LAWS, Case
from bestiary.conformance.laws import Law, decode
from bestiary.conformance.run import Verdict, table

PARTS = [(mixers.registry, name) for name in mixers.names()] + [
    (channel_mixers.registry, name) for name in channel_mixers.names()
]
IDS = [name for _, name in PARTS]


@st.composite
def cases(draw: st.DrawFn, registry, name: str) -> Case:
    d_model = draw(st.sampled_from([32, 64, 96]))
    time = draw(st.one_of(st.integers(0, 3), st.integers(4, 90)))
    cuts = tuple(sorted(draw(st.lists(st.integers(0, time), min_size=1, max_size=4))))
    return Case(
        lambda: registry.build(name, d_model),
        seed=draw(st.integers(0, 10_000)),
        batch=draw(st.integers(1, 3)),
        time=time,
        cuts=cuts,
        strong=draw(st.booleans()),
        d_model=d_model,
    )


@pytest.mark.parametrize(("registry", "name"), PARTS, ids=IDS)
@pytest.mark.parametrize("law", LAWS, ids=[law.name for law in LAWS])
def test_law(law: Law, registry, name: str) -> None:
    if law.causal_only and not registry.get(name).causal:
        pytest.skip("a law of causal mixers")
    worst, examples = Verdict(name, law.name, 0.0, law.tolerance, 0), law.examples or 10

    @seed(20231203)
    @settings(max_examples=examples, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=cases(registry, name))
    def holds(case: Case) -> None:
        nonlocal worst
        deviation = law.deviation(case)
        worst = Verdict(name, law.name, max(worst.worst, deviation), law.tolerance, worst.examples + 1)
        assert deviation <= law.tolerance, f"{law.claim}: off by {deviation:.1e} in {case}"

    holds()
    assert worst.examples == examples


@pytest.mark.slow
@pytest.mark.parametrize(("registry", "name"), PARTS, ids=IDS)
@pytest.mark.parametrize("strong", [False, True])
def test_20000_steps_of_decoding_stay_finite(registry, name: str, strong: bool) -> None:
    if not registry.get(name).causal:
        pytest.skip("bidirectional: it does not decode")
    assert decode(Case(lambda: registry.build(name, 32), strong=strong), 20_000) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("registry", "name"), PARTS, ids=IDS)
def test_more_cases_at_other_widths(registry, name: str) -> None:
    from bestiary.conformance import check

    verdicts = check(name, lambda: registry.build(name, 160), examples=30, seed=11)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == [], table(verdicts)
