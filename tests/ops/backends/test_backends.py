"""Other libraries' functions get what they want and give what we want, and run only where they were found right.

The libraries are stand-ins here (fakes.py): layout, scale, form of decay and state are proved, not their kernels.
"""

import json
import subprocess
import sys

import pytest
import torch
from ops.backends import fakes
from ops.backends.fakes import libraries  # noqa: F401  (a fixture)
from ops.forms import relative

from bestiary import UsageError, mixers, ops
from bestiary.cli import doctor
from bestiary.ops import backends, dispatch
from bestiary.ops.backends import check, record
from bestiary.ops.wkv import WKVState

CPU = torch.device("cpu")
SMALL = {1: (32, 33), 3: (32, 64), 66: (32, 32)}
ALL = [(op, backend) for op, able in backends.TABLE.items() for backend in able]
named = pytest.mark.parametrize(("op", "backend"), ALL, ids=[backend.function.split(".")[-1] for _, backend in ALL])


def arguments(op: str, backend: backends.Backend, time: int, kind: str) -> list:
    """What the forms of an op get, in float64, for one case of the check."""
    seen = {}
    call, inputs = check.CASES[op](
        check._Draw(torch.Generator().manual_seed(1), time, kind), backend.function.split(".")[-1]
    )
    reference = dispatch._forms[op]["reference"]

    def spy(*given):
        seen["given"] = given
        return reference(*given)

    dispatch._forms[op]["reference"] = spy
    try:
        with ops.use("reference"):
            call(**inputs)
    finally:
        dispatch._forms[op]["reference"] = reference
    return list(seen["given"])


def flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in flat(part)]


def results(function, given: list) -> list[torch.Tensor]:
    """Outputs, and gradients of a random function of them, of a form of an op."""
    live = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given]
    live = [WKVState(*(y.detach().requires_grad_() for y in x)) if isinstance(x, WKVState) else x for x in live]
    outputs = function(*live)
    if isinstance(outputs, tuple) and isinstance(outputs[1], WKVState):  # its reference exponent is free to choose
        state = outputs[1]
        outputs = (outputs[0], state.num / state.den, state.den.log() + state.max)
    outputs, generator = flat(outputs), torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    inputs = [x for x in flat([x for x in live if x is not None])]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients))]


@named
@pytest.mark.parametrize("kind", check.GATES)
@pytest.mark.parametrize("time", [1, 3, 64])
def test_arguments_are_mapped_to_the_same_function(op, backend, time, kind, libraries) -> None:  # noqa: F811
    """In float64 to the last digits: outputs, final states, gradients of every argument, from a state beside zero."""
    given = arguments(op, backend, time, kind)
    found = results(lambda *x: backend(torch.float64, *x), given)
    assert relative(found, results(dispatch._forms[op]["reference"], given)) < 1e-10
    assert set(fakes.CALLS) == {backend.function.split(".")[-1]}


@pytest.mark.parametrize("shape", [(), (4,), (2, 5, 4)], ids=["no gate", "a gate a head", "a gate a head and step"])
def test_gates_of_any_shape_reach_a_function_with_a_bonus(shape, libraries) -> None:  # noqa: F811
    q, k, v = (torch.randn(2, 5, 4, 8, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(shape, dtype=torch.float64) if shape else None
    given = [q, k, v, g, torch.randn(4, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)]
    backend = backends.TABLE["linear_attention"][2]
    found = results(lambda *x: backend(torch.float64, *x), given)
    assert relative(found, results(dispatch._forms["linear_attention"]["reference"], given)) < 1e-10


@named
def test_the_check_finds_right_functions_right(op, backend, libraries, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(check, "DIMS", SMALL)
    for dtype in (torch.float32, torch.bfloat16):
        finding = check.check(op, backend, CPU, dtype)
        refused = backend.function.endswith("chunk_dplr_delta_rule") and dtype == torch.float32
        assert finding.verdict == ("refused" if refused else "ok"), finding


def found(function: str, verdict: str, dtype: torch.dtype = torch.float32) -> None:
    """Put a finding into the record, as the check does."""
    backend = next(backend for _, backend in ALL if backend.function.endswith(function))
    record.add({record.key(backend, CPU, dtype): {"verdict": verdict, "detail": "as the test says"}})


def gated(dtype: torch.dtype = torch.float32, time: int = 9) -> torch.Tensor:
    """Some gated linear attention, in whatever form is chosen."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, time, 2, 8, dtype=dtype) for _ in range(3))
    return ops.linear_attention(q, k, v, -torch.rand(2, time, 2, 8, dtype=dtype))[0]


def test_nothing_runs_that_was_not_checked(libraries) -> None:  # noqa: F811
    with ops.use("torch"):
        own = gated()
    assert torch.equal(gated(), own) and not fakes.CALLS
    found("chunk_gla", "ok")
    torch.testing.assert_close(gated(), own)
    assert fakes.CALLS == ["chunk_gla"]


def test_what_was_found_holds_for_one_dtype_one_version_and_one_function(libraries) -> None:  # noqa: F811
    found("chunk_gla", "ok")
    found("chunk_rwkv6", "ok")
    gated(torch.bfloat16)
    assert not fakes.CALLS
    libraries["fla-core"] = "0.6.1"
    gated()
    assert not fakes.CALLS
    libraries["fla-core"], libraries["triton"] = "0.6.0", "3.9.0"
    gated()
    assert not fakes.CALLS
    del libraries["triton"]
    gated()
    assert fakes.CALLS == ["chunk_gla"]


def test_a_single_step_and_a_forced_form_stay_ours(libraries) -> None:  # noqa: F811
    found("chunk_gla", "ok")
    gated(time=1)
    for form in ("torch", "reference"):
        with ops.use(form):
            gated()
    assert not fakes.CALLS


@pytest.mark.parametrize("verdict", ["wrong", "failed", "refused"])
def test_what_was_found_wrong_is_never_chosen(verdict, libraries) -> None:  # noqa: F811
    found("chunk_gla", verdict)
    gated()
    assert not fakes.CALLS
    told = backends.standing(CPU)["fla.ops.gla.chunk_gla"]
    assert f"float32 {verdict} when it was checked: as the test says" in told


@pytest.mark.parametrize(
    "content", ["", "{", '{"schema": 1}', '{"schema": 0, "findings": {}}', '{"schema": 1, "findings": 3}']
)
def test_a_damaged_record_speaks_for_nothing_and_is_replaced(content, libraries) -> None:  # noqa: F811
    record.path().write_text(content)
    gated()
    assert not fakes.CALLS
    found("chunk_gla", "ok")
    gated()
    assert fakes.CALLS == ["chunk_gla"] and json.loads(record.path().read_text())["schema"] == record.SCHEMA


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.54 * grad


@pytest.mark.parametrize(
    ("spoil", "verdict", "detail"),
    [
        (lambda q, k, v, g, **rest: fakes.chunk_gla(q, k, v, g, **rest | {"scale": None}), "wrong", "error 8"),
        (lambda k, **rest: fakes.chunk_gla(k=WrongGradient.apply(k), **rest), "wrong", "in gradient of k"),
        (lambda **all: (lambda o, S: (o, S.mT))(*fakes.chunk_gla(**all)), "failed", "linear_attention"),
        (lambda **all: (lambda o, S: (o / 0, S))(*fakes.chunk_gla(**all)), "wrong", "error nan"),
        (lambda **all: fakes.chunk_gla(order=1, **all), "failed", "TypeError"),
    ],
    ids=["another scale", "a wrong gradient", "another layout", "infinities", "another signature"],
)
def test_the_check_finds_a_wrong_function_wrong(spoil, verdict, detail, libraries, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys.modules["fla.ops.gla"], "chunk_gla", spoil)
    monkeypatch.setattr(check, "DIMS", SMALL)
    finding = check.check("linear_attention", backends.TABLE["linear_attention"][1], CPU, torch.float32)
    assert finding.verdict == verdict and detail in finding.detail, finding


LIBRARY_OF = {
    "gla": "fla",
    "retnet": "fla",
    "mamba2": "fla",
    "rwkv6": "fla",
    "rwkv4": "fla",
    "gated_delta_net": "fla",
    "kda": "fla",
    "mlstm": "fla",
    "mamba": "mamba_ssm",
    "lfm2": "causal_conv1d",
}
LIBRARY_OF = {name: library for name, library in LIBRARY_OF.items() if name in mixers.names()}


@pytest.mark.parametrize(("name", "library"), LIBRARY_OF.items())
def test_a_mixer_is_the_same_by_another_library(name, library, libraries) -> None:  # noqa: F811
    """Going on from a state, padding included where the function allows it."""
    mixer, x = mixers.build(name, 32), torch.randn(3, 12, 32)
    lengths = None if name == "rwkv4" else torch.tensor([7, 0, 5])
    results = []
    for form in ("torch", library):
        with ops.use(form):
            _, state = mixer(x[:, :5])
            y, state = mixer(x[:, 5:], state, lengths=lengths)
        results.append((y, *mixer(x[:, :5], state)[:1], *torch.autograd.grad(y.square().sum(), mixer.parameters())))
    assert fakes.CALLS
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_a_library_cannot_compute_is_an_error_where_it_is_forced(libraries, monkeypatch) -> None:  # noqa: F811
    x, w = torch.randn(2, 5, 8), torch.randn(8, 5)
    with ops.use("causal_conv1d"), pytest.raises(UsageError, match="it has 2 to 4 taps, not 5"):
        ops.short_convolution(x, w)
    with ops.use("causal_conv1d"), pytest.raises(UsageError, match="do not compute in float64"):
        ops.short_convolution(x.double(), w[:, :4].double())
    u, state = torch.randn(1, 4, 8), ops.empty_wkv(1, 8)
    with ops.use("fla"), pytest.raises(UsageError, match="it has no lengths"):
        ops.wkv(u, u, -torch.ones(8), torch.ones(8), state=state, lengths=torch.tensor([3]))
    scan = (u, u.exp(), -torch.ones(8, 2), torch.randn(1, 4, 2), torch.randn(1, 4, 2))
    with ops.use("mamba_ssm"), pytest.raises(UsageError, match="it discretises by euler alone"):
        ops.selective_scan(*scan, discretisation="zoh")
    monkeypatch.setattr(sys.modules["mamba_ssm.ops.selective_scan_interface"], "selective_scan_cuda", None)
    with ops.use("mamba_ssm"), pytest.raises(UsageError, match="MAMBA_KEEP_CUDA_BUILD=TRUE"):
        ops.selective_scan(*scan)
    libraries["fla-core"] = "0.5.1"
    with ops.use("fla"), pytest.raises(UsageError, match=r"fla-core is 0.5.1, and 0.5.2 is needed"):
        gated()
    del libraries["fla-core"]
    with ops.use("fla"), pytest.raises(UsageError, match="fla-core is not installed"):
        gated()
    with ops.use("fla"):  # ops that the library has nothing for run as ever
        ops.short_convolution(x, w)


def test_on_the_cpu_no_library_is_called_nor_imported() -> None:
    with ops.use("fla"), pytest.raises(UsageError, match="run on cuda, not on cpu"):
        gated()
    code = "import sys, bestiary.cli.doctor; print({'fla', 'mamba_ssm', 'causal_conv1d', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_doctor_without_a_gpu_says_that_it_compared_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "_gpu", lambda: None)
    assert doctor.main(["--check-backend", "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "fla-core" in printed and "Nothing was compared" in printed and not record.path().exists()
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["checked"] == [] and "no CUDA GPU" in told["GPU libraries"]["used"]


def test_doctor_checks_records_and_tells_what_is_used(libraries, capsys, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(check, "DIMS", {3: (32, 33)})
    monkeypatch.setattr(doctor, "_gpu", lambda: CPU)
    monkeypatch.setattr(sys.modules["fla.ops.kda"], "chunk_kda", fakes.chunk_gated_delta_rule)
    assert doctor.main(["--check-backend", "--json", str(tmp_path / "found.json")]) == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert len(told["checked"]) == 3 * len(ALL) and str(record.path()) in capsys.readouterr().out
    assert told["GPU libraries"]["fla.ops.gla.chunk_gla"] == "linear_attention: float32, bfloat16, float16 used"
    assert "failed when it was checked" in told["GPU libraries"]["fla.ops.kda.chunk_kda"]
    fakes.CALLS.clear()
    mixers.build("gla", 32)(torch.randn(1, 5, 32))
    mixers.build("kda", 32)(torch.randn(1, 5, 32))
    assert "chunk_gla" in fakes.CALLS and "chunk_kda" not in fakes.CALLS
