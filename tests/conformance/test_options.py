"""Options that change what a mixer computes obey the laws as its defaults do."""

import pytest

from bestiary import channel_mixers, mixers
from bestiary.conformance import check
from bestiary.conformance.run import table

OPTIONS = [
    (mixers.registry, "attention", {"head_dim": 24, "n_heads": 4, "n_kv_heads": 2, "gate": True}),
    (mixers.registry, "attention", {"qk_norm": True, "rotary_dims": 6, "rotary_stretch": 4.0, "window": 5}),
    (mixers.registry, "zamba_attention", {"qk_norm": True, "gate": True, "head_dim": 12}),
    (mixers.registry, "gated_delta_net", {"n_heads": 2, "n_value_heads": 6, "norm_eps": 1e-6}),
    (mixers.registry, "mamba", {"norm_dt_bc": True, "norm_eps": 1e-4}),
    (mixers.registry, "mamba2", {"n_groups": 2, "head_dim": 16}),
    (channel_mixers.registry, "moe", {"shared": 2, "shared_gate": True}),
]


@pytest.mark.parametrize(
    ("registry", "name", "options"), OPTIONS, ids=[f"{name} {options}" for _, name, options in OPTIONS]
)
def test_options_obey_the_laws(registry, name: str, options: dict) -> None:
    verdicts = check(name, lambda: registry.build(name, 64, **options), examples=4)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == [], table(verdicts)
