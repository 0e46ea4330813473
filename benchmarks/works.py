"""The works: Mamba-130M's shape with random weights, and single ops. Peers are imported when they are asked for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Missing, Run, Work
from bestiary import LanguageModel, ModelConfig, ops
from bestiary.ops.native import load

LAYERS, WIDTH, VOCABULARY = 24, 768, 50280


def _no_grad(run: Run) -> Run:
    return torch.no_grad()(run)


@cache
def _ours(layout: str = f"mamba*{LAYERS}") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(layout, WIDTH, VOCABULARY)).eval()


@cache
def _packed(weights: str) -> LanguageModel:
    if load()[0] is None:
        raise Missing(load()[1])
    return _ours().packed(weights)


@cache
def _transformers(kind: str) -> Any:
    import transformers

    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    if kind == "GPTNeoX":
        options = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 4 * WIDTH}
    elif kind == "Mamba2":
        options = {"num_hidden_layers": LAYERS, "num_heads": 24, "n_groups": 1}
    else:
        options = {"num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**common, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@cache
def _mambapy() -> Any:
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    return torch.nn.ModuleList(
        [
            torch.nn.Embedding(VOCABULARY, WIDTH),
            Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS)),
            torch.nn.Linear(WIDTH, VOCABULARY, bias=False),
        ]
    ).eval()


def decode() -> list[Work]:
    """One token at batch 1."""
    token = torch.zeros(1, dtype=torch.long)

    def stepper(model: LanguageModel) -> Run:
        state = model.initial_state(1)

        def run() -> None:
            nonlocal state
            _, state = model.step(token, state)

        return _no_grad(run)

    def theirs(kind: str) -> Run:
        model = _transformers(kind)
        with torch.no_grad():
            kept = model(token[None], use_cache=True)
        name = "cache_params" if hasattr(kept, "cache_params") else "past_key_values"
        cached = {name: getattr(kept, name), "use_cache": True}
        return _no_grad(lambda: model(token[None], **cached))

    def mambapy() -> Run:
        embedding, mamba, head = _mambapy()
        caches = [(None, torch.zeros(1, 2 * WIDTH, 3)) for _ in range(LAYERS)]

        def run() -> None:
            nonlocal caches
            y, caches = mamba.step(embedding(token), caches)
            head(y)

        return _no_grad(run)

    peers = {
        "mambapy": mambapy,
        **{f"transformers {k}": (lambda k=k: theirs(k)) for k in ("Mamba", "Mamba2", "GPTNeoX")},
    }
    ours = {f"bestiary {form}": (lambda form=form: stepper(_packed(form))) for form in ("fp32", "bf16", "int8", "int4")}
    plain = {"bestiary, not packed": lambda: stepper(_ours())}
    return [Work("decode", "decode a token, batch 1", "bestiary fp32", ours | plain | peers, 1)]


def prefill() -> list[Work]:
    """A prompt of 512 tokens, all logits."""
    tokens = torch.randint(VOCABULARY, (1, 512))

    def theirs(kind: str) -> Run:
        model = _transformers(kind)
        return _no_grad(lambda: model(tokens, use_cache=False))

    def mambapy() -> Run:
        embedding, mamba, head = _mambapy()
        return _no_grad(lambda: head(mamba(embedding(tokens))))

    contenders: dict[str, Callable[[], Run]] = {
        "bestiary": lambda: _no_grad(lambda: _ours()(tokens)),
        "bestiary, fp32 packed": lambda: _no_grad(lambda: _packed("fp32")(tokens)),
        "bestiary, bf16 packed": lambda: _no_grad(lambda: _packed("bf16")(tokens)),
        "bestiary mamba2": lambda: _no_grad(lambda: _ours(f"mamba2*{LAYERS}")(tokens)),
        "mambapy": mambapy,
        **{f"transformers {k}": (lambda k=k: theirs(k)) for k in ("Mamba", "Mamba2", "GPTNeoX")},
    }
    return [Work("prefill", "read 512 tokens, all logits", "bestiary", contenders, 512)]


def train() -> list[Work]:
    """A training step, batch 1 of 512 tokens, without the optimiser."""
    tokens = torch.randint(VOCABULARY, (1, 513))

    def step(parameters: Any, loss: Callable[[], Tensor]) -> Run:
        parameters = list(parameters)

        def run() -> None:
            loss().backward()
            for parameter in parameters:
                parameter.grad = None

        return run

    def ours() -> Run:
        model = _ours()
        return step(model.parameters(), lambda: model.loss(tokens[:, :-1], tokens[:, 1:])[0])

    def neox() -> Run:
        model = _transformers("GPTNeoX")
        return step(model.parameters(), lambda: model(tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss)

    def mambapy() -> Run:
        embedding, mamba, head = modules = _mambapy()

        def loss() -> Tensor:
            return F.cross_entropy(head(mamba(embedding(tokens[:, :-1])))[0], tokens[0, 1:])

        return step(modules.parameters(), loss)

    contenders = {"bestiary": ours, "transformers GPTNeoX": neox, "mambapy": mambapy}
    return [Work("train", "forward and backward, 512 tokens", "bestiary", contenders, 512)]


def scan() -> list[Work]:
    """The selective scan alone: 1536 channels, 16 states."""
    found = []
    for time in (512, 2048):
        torch.manual_seed(0)
        u, dt, z = (torch.randn(1, time, 1536) for _ in range(3))
        A, B, C = -torch.rand(1536, 16), torch.randn(1, time, 16), torch.randn(1, time, 16)
        D, bias = torch.randn(1536), torch.randn(1536)
        live = [x.requires_grad_() for x in (u, dt, A, B, C, D, z, bias)]

        def forward(form: str, live: list[Tensor] = live) -> Tensor:
            u, dt, A, B, C, D, z, bias = live
            with ops.use(form):
                return ops.selective_scan(u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)[0]

        def pscan(live: list[Tensor] = live) -> Tensor:
            from mambapy.pscan import pscan as scan

            u, dt, A, B, C, D, z, bias = live
            step = F.softplus(dt + bias)
            h = scan(torch.exp(step[..., None] * A), (step * u)[..., None] * B[:, :, None])
            return ((h @ C[..., None])[..., 0] + D * u) * F.silu(z)

        def both(y: Callable[[], Tensor], live: list[Tensor] = live) -> Run:
            return lambda: torch.autograd.grad(y().sum(), live)

        forms: dict[str, Callable[[], Tensor]] = {
            "native": lambda forward=forward: forward("native"),
            "torch": lambda forward=forward: forward("torch"),
            "mambapy pscan": pscan,
        }
        for name, title, wrap in (("scan", "scan", _no_grad), ("scan-grad", "scan and gradients", both)):
            contenders = {form: (lambda y=y, wrap=wrap: wrap(y)) for form, y in forms.items()}
            found.append(Work(f"{name}-{time}", f"{title}, {time} steps", "native", contenders, time, "step"))
    return found


def mixing() -> list[Work]:
    """Gated linear attention and the delta rule against causal attention: 12 heads x 64, forward and backward."""
    found = []
    for time in (512, 2048):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, time, 12, 64).requires_grad_() for _ in range(3))
        gates = (-torch.rand(1, time, 12)).requires_grad_()
        beta = torch.rand(1, time, 12).requires_grad_()
        unit = F.normalize(k.detach(), dim=-1).requires_grad_()

        def attention(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Run:
            def run() -> None:
                o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
                torch.autograd.grad(o.sum(), (q, k, v))

            return run

        def linear(form: str, q: Tensor = q, k: Tensor = k, v: Tensor = v, gates: Tensor = gates) -> Run:
            def run() -> None:
                with ops.use(form):
                    o, _ = ops.linear_attention(q, k, v, gates)
                torch.autograd.grad(o.sum(), (q, k, v, gates))

            return run

        def delta(form: str, q: Tensor = q, k: Tensor = unit, v: Tensor = v, rest: Any = (beta, gates)) -> Run:
            def run() -> None:
                with ops.use(form):
                    o, _ = ops.delta_rule(q, k, v, *rest)
                torch.autograd.grad(o.sum(), (q, k, v, *rest))

            return run

        contenders: dict[str, Callable[[], Run]] = {"attention (SDPA)": attention}
        for form in ("native", "torch"):
            contenders[f"linear attention, {form}"] = lambda form=form, linear=linear: linear(form)
            contenders[f"delta rule, {form}"] = lambda form=form, delta=delta: delta(form)
        title = f"mixing {time} steps, forward and backward"
        found.append(Work(f"mixing-{time}", title, "linear attention, native", contenders, time, "step"))
    return found


GROUPS: dict[str, Callable[[], list[Work]]] = {
    "decode": decode,
    "prefill": prefill,
    "train": train,
    "scan": scan,
    "mixing": mixing,
}
