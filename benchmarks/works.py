"""The works: Mamba-130M's shape and others of its size with random weights, and single ops, against peers.

A contender's `prepare` runs in a process of its own (benchmarks/child.py) and returns what one round runs.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import llama, peers
from benchmarks.harness import Contender, Missing, Run, Work
from benchmarks.peers import LAYERS, VOCABULARY, WIDTH
from bestiary import LanguageModel, ModelConfig, ops, state
from bestiary.mixers.attention import Attention
from bestiary.models.packing import PackedLinear
from bestiary.ops.native import load
from bestiary.ops.native.matvec import PackedMatrix

STEPS = 16
"""Tokens of one round of decoding."""
PROMPT = 512


def no_grad(run: Run) -> Run:
    return torch.no_grad()(run)


def model(layout: str = f"mamba*{LAYERS}", **options: Any) -> LanguageModel:
    """One of ours, in the shape of all."""
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(layout, WIDTH, VOCABULARY, **options)).eval()


def packed(weights: str, layout: str = f"mamba*{LAYERS}", **options: Any) -> LanguageModel:
    """The same with packed weights."""
    if load()[0] is None:
        raise Missing(load()[1])
    return model(layout, **options).packed(weights)


def stepper(net: LanguageModel, remembered: Any = None) -> Run:
    """STEPS tokens at batch 1, from a state that it may write over."""
    token = torch.zeros(1, dtype=torch.long)
    kept = [net.initial_state(1) if remembered is None else remembered]

    def run() -> None:
        with torch.no_grad(), state.in_place():
            for _ in range(STEPS):
                _, kept[0] = net.step(token, kept[0])

    return run


def decode() -> list[Work]:
    """Tokens at batch 1."""
    found = []
    for ours, theirs, target in (
        ("fp32", "f32", 1.4),
        ("bf16", "bf16", 2.0),
        ("int8", "q8_0", 2.1),
        ("int4", "q4_0", 1.5),
    ):
        contenders = {
            f"bestiary {ours}": Contender(lambda ours=ours: stepper(packed(ours))),
            f"llama.cpp {theirs}": Contender(lambda theirs=theirs: _llama_steps(theirs), target),
            "our products alone, as one matrix": Contender(lambda ours=ours: _products(ours)),
        }
        if ours == "fp32":
            contenders["bestiary, not packed"] = Contender(lambda: stepper(model()))
            contenders["mambapy"] = Contender(_mambapy_steps)
            for kind in ("Mamba", "Mamba2", "GPTNeoX"):
                contenders[f"transformers {kind}"] = Contender(lambda kind=kind: _transformers_steps(kind))
        found.append(Work(f"decode-{ours}", f"Decode, batch 1, {ours}", contenders, STEPS))
    return found


def _products(weights: str) -> Run:
    """A matrix with as many numbers as a step multiplies with: what it costs to read them, nearly."""
    net = packed(weights)
    count = sum(math.prod(module.matrix.shape) for module in net.modules() if isinstance(module, PackedLinear))
    matrix, x = PackedMatrix(torch.randn(count // WIDTH, WIDTH), weights), torch.randn(1, WIDTH)

    def run() -> None:
        for _ in range(STEPS):
            matrix.multiply(x)

    return run


def _llama_steps(form: str) -> Run:
    peer = llama.Llama(llama.write_gguf(model(), form), VOCABULARY)

    def run() -> None:
        peer.forget()
        for _ in range(STEPS):
            peer.read([0])

    return run


def _mambapy_steps() -> Run:
    embedding, layers, head = peers.mambapy()
    token, caches = torch.zeros(1, dtype=torch.long), [(None, torch.zeros(1, 2 * WIDTH, 3)) for _ in range(LAYERS)]

    def run() -> None:
        kept = caches
        for _ in range(STEPS):
            y, kept = layers.step(embedding(token), kept)
            head(y)

    return no_grad(run)


def _transformers_steps(kind: str) -> Run:
    net, token = peers.transformers(kind, 12 if kind == "GPTNeoX" else LAYERS), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        kept = net(token, use_cache=True)
    name = "cache_params" if hasattr(kept, "cache_params") else "past_key_values"
    cached = {name: getattr(kept, name), "use_cache": True}

    def run() -> None:
        for _ in range(STEPS):
            net(token, **cached)

    return no_grad(run)


def prompt() -> list[Work]:
    """A prompt of 512 tokens, the last logits alone."""
    found = []
    for ours, theirs, target in (("fp32", "f32", 3.3), ("bf16", "bf16", 3.8)):
        contenders = {
            f"bestiary {ours}": Contender(lambda ours=ours: _last(packed(ours))),
            f"llama.cpp {theirs}": Contender(lambda theirs=theirs: _llama_prompt(theirs), target),
        }
        found.append(Work(f"prompt-{ours}", f"Read {PROMPT} tokens, last logits, {ours}", contenders, PROMPT))
    return found


def _last(net: LanguageModel) -> Run:
    tokens = torch.randint(VOCABULARY, (1, PROMPT))
    return no_grad(lambda: net.head(net.hidden(tokens)[0][:, -1]))


def _llama_prompt(form: str) -> Run:
    peer, tokens = (
        llama.Llama(llama.write_gguf(model(), form), VOCABULARY),
        torch.randint(VOCABULARY, (PROMPT,)).tolist(),
    )

    def run() -> None:
        peer.forget()
        peer.read(tokens)

    return run


def prefill() -> list[Work]:
    """A prompt of 512 tokens, all logits, fp32."""
    tokens = torch.randint(VOCABULARY, (1, PROMPT))

    def whole(net: LanguageModel) -> Run:
        return no_grad(lambda: net(tokens))

    def theirs(kind: str) -> Run:
        net = peers.transformers(kind, 12 if kind == "GPTNeoX" else LAYERS)
        return no_grad(lambda: net(tokens, use_cache=False))

    def mambapy() -> Run:
        embedding, layers, head = peers.mambapy()
        return no_grad(lambda: head(layers(embedding(tokens))))

    first = {
        "bestiary fp32": Contender(lambda: whole(packed("fp32"))),
        "transformers Mamba": Contender(lambda: theirs("Mamba"), 5),
        "mambapy": Contender(mambapy, 6),
        "transformers GPTNeoX": Contender(lambda: theirs("GPTNeoX")),
        "bestiary, not packed": Contender(lambda: whole(model())),
        "bestiary bf16": Contender(lambda: whole(packed("bf16"))),
    }
    second = {
        "bestiary mamba2 fp32": Contender(lambda: whole(packed("fp32", f"mamba2*{LAYERS}"))),
        "transformers Mamba2": Contender(lambda: theirs("Mamba2"), 2.5),
    }
    title = f"Read {PROMPT} tokens, all logits, fp32"
    return [Work("prefill", title, first, PROMPT), Work("prefill-mamba2", f"{title}, Mamba-2", second, PROMPT)]


def train() -> list[Work]:
    """A training step at batch 1, without the optimiser."""
    found = []
    for name, half, target in (("fp32", False, 5.0), ("bf16", True, 7.0)):
        contenders = {
            f"bestiary {name}": Contender(lambda half=half: training_step(f"mamba*{LAYERS}", PROMPT, half=half)),
            "mambapy fp32": Contender(lambda: _mambapy_train(half=False), target),
        }
        if half:
            contenders["mambapy bf16"] = Contender(lambda: _mambapy_train(half=True))
        title = f"Training step, {LAYERS} layers, {PROMPT} tokens, {name}"
        found.append(Work(f"train-{name}", title, contenders, PROMPT, most_rounds=3))
    for time, share, target in ((512, 1, 1.0), (2048, 1, 1.3), (8192, 2, 2.5)):
        layers = LAYERS // share
        contenders = {
            "bestiary mamba": Contender(lambda time=time, layers=layers: training_step(f"mamba*{layers}", time)),
            "transformers GPTNeoX, SDPA": Contender(
                lambda time=time, layers=layers: _neox_step(time, layers // 2), target
            ),
        }
        title = f"Training step of equal parameters, {time} tokens, {layers} layers against {layers // 2}"
        found.append(Work(f"train-{time}", title, contenders, time, most_rounds=3 if time > 2048 else None))
    return found


def products() -> list[Work]:
    """Training steps with fp32 products by the library that `ops.linear` chooses, and by MKL alone."""

    def by_mkl(layout: str) -> Run:
        sys.modules["bestiary.ops.linear"]._usable = lambda: False
        return training_step(layout, PROMPT)

    found = []
    for kind in ("mamba", "mamba2", "gla"):
        layout = f"{kind}*{LAYERS}"
        contenders = {
            "bestiary": Contender(lambda layout=layout: training_step(layout, PROMPT)),
            "the same, products by MKL": Contender(lambda layout=layout: by_mkl(layout), 1.0),
        }
        found.append(Work(f"products-{kind}", f"Products in a training step of {kind}, fp32", contenders, PROMPT))
    return found


def _step(parameters: Any, loss: Callable[[], Tensor]) -> Run:
    parameters = list(parameters)

    def run() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    return run


def training_step(layout: str, time: int, *, half: bool = False) -> Run:
    """Loss and gradients of one of ours, in fp32 or by bf16 autocast."""
    net, tokens = model(layout).train(), torch.randint(VOCABULARY, (1, time + 1))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return net.loss(tokens[:, :-1], tokens[:, 1:])[0]

    return _step(net.parameters(), loss)


def _neox_step(time: int, layers: int) -> Run:
    net, tokens = peers.transformers("GPTNeoX", layers).train(), torch.randint(VOCABULARY, (1, time))
    return _step(net.parameters(), lambda: net(tokens, labels=tokens, use_cache=False).loss)


def _mambapy_train(*, half: bool) -> Run:
    embedding, layers, head = modules = peers.mambapy()
    tokens = torch.randint(VOCABULARY, (1, PROMPT + 1))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return F.cross_entropy(head(layers(embedding(tokens[:, :-1])))[0], tokens[0, 1:])

    return _step(modules.parameters(), loss)


def scan_inputs(time: int, channels: int = 1536) -> list[Tensor]:
    """u, dt, A, B, C, D, z and the bias of dt, with 16 states a channel."""
    torch.manual_seed(0)
    u, dt, z = (torch.randn(1, time, channels) for _ in range(3))
    A, B, C = -torch.rand(channels, 16), torch.randn(1, time, 16), torch.randn(1, time, 16)
    return [u, dt, A, B, C, torch.randn(channels), z, torch.randn(channels)]


def our_scan(live: list[Tensor]) -> Tensor:
    """The scan with its softplus, skip and gate."""
    u, dt, A, B, C, D, z, bias = live
    return ops.selective_scan(u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)[0]


def pscan(live: list[Tensor]) -> Tensor:
    """The same as mambapy has it."""
    from mambapy.pscan import pscan as scan

    u, dt, A, B, C, D, z, bias = live
    step = F.softplus(dt + bias)
    h = scan(torch.exp(step[..., None] * A), (step * u)[..., None] * B[:, :, None])
    return ((h @ C[..., None])[..., 0] + D * u) * F.silu(z)


def scan() -> list[Work]:
    """The selective scan alone: 1536 channels, 16 states."""
    time = 2048

    def prepare(y: Callable[[list[Tensor]], Tensor], gradients: bool, form: str | None = None) -> Run:
        live = [x.requires_grad_(gradients) for x in scan_inputs(time)]

        def run() -> None:
            if form is None:
                result = y(live)
            else:
                with ops.use(form):
                    result = y(live)
            if gradients:
                torch.autograd.grad(result.sum(), live)

        return run

    found = []
    for name, title, gradients, target in (
        ("scan", "Selective scan", False, 60.0),
        ("scan-grad", "The same with gradients", True, 50.0),
    ):
        contenders = {
            "bestiary": Contender(lambda g=gradients: prepare(our_scan, g, "native")),
            "mambapy pscan": Contender(lambda g=gradients: prepare(pscan, g), target),
            "bestiary in PyTorch": Contender(lambda g=gradients: prepare(our_scan, g, "torch")),
        }
        found.append(Work(name, f"{title}, {time} steps", contenders, time, "step"))
    return found


def wkv() -> list[Work]:
    """RWKV-4's operator, 768 channels."""
    time = 2048

    def prepare(form: str) -> Run:
        torch.manual_seed(0)
        k, v, w, u = torch.randn(1, time, WIDTH), torch.randn(1, time, WIDTH), -torch.rand(WIDTH), torch.randn(WIDTH)

        def run() -> None:
            with ops.use(form):
                ops.wkv(k, v, w, u)

        return no_grad(run)

    contenders = {
        "bestiary": Contender(lambda: prepare("native")),
        "the recurrence in Python": Contender(lambda: prepare("reference"), 100),
        "bestiary in PyTorch": Contender(lambda: prepare("torch")),
    }
    return [Work("wkv", f"WKV of RWKV-4, {time} steps", contenders, time, "step")]


def mixing() -> list[Work]:
    """Gated linear attention and the delta rule against causal attention: 12 heads x 64, forward and backward."""

    def prepare(kind: str, time: int, form: str) -> Run:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, time, 12, 64).requires_grad_() for _ in range(3))
        k = F.normalize(k.detach(), dim=-1).requires_grad_()
        gates = (-torch.rand(1, time, 12, *([64] if kind == "gla" else []))).requires_grad_()
        beta = torch.rand(1, time, 12).requires_grad_()

        def run() -> None:
            with ops.use(form):
                if kind == "gla":
                    o, live = ops.linear_attention(q, k, v, gates)[0], (q, k, v, gates)
                else:
                    o, live = ops.delta_rule(q, k, v, beta, gates)[0], (q, k, v, gates, beta)
            torch.autograd.grad(o.sum(), live)

        return run

    def attention(time: int) -> Run:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 12, time, 64).requires_grad_() for _ in range(3))
        return lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))

    found = []
    for time, target in ((2048, 3.0), (8192, 10.0)):
        for kind, title in (("gla", "Gated linear attention"), ("delta", "Gated delta rule")):
            contenders = {
                "bestiary": Contender(lambda k=kind, t=time: prepare(k, t, "native")),
                "attention (SDPA)": Contender(lambda t=time: attention(t), target),
                "bestiary in PyTorch": Contender(lambda k=kind, t=time: prepare(k, t, "torch")),
            }
            title = f"{title} with gradients, {time} steps, 12 heads of 64"
            found.append(Work(f"{kind}-{time}", title, contenders, time, "step"))
    return found


def rwkv() -> list[Work]:
    """RWKV-4 and 7 of 12 layers against their author's package."""
    found = []
    for name, title in (("rwkv4", "RWKV-4"), ("rwkv7", "RWKV-7")):
        options = {"norm": "layer", "norm_eps": 1e-5, "tie_embeddings": False}

        def theirs(name: str = name, options: dict[str, Any] = options) -> Run:
            peer = peers.rwkv(model(f"{name}*12", **options), llama.FILES)
            kept = [peer.forward([0], None)[1]]

            def run() -> None:
                for _ in range(STEPS):
                    _, kept[0] = peer.forward([0], kept[0])

            return no_grad(run)

        contenders = {
            "bestiary fp32": Contender(lambda n=name, o=options: stepper(packed("fp32", f"{n}*12", **o))),
            "rwkv fp32": Contender(theirs, 3),
            "bestiary int8": Contender(lambda n=name, o=options: stepper(packed("int8", f"{n}*12", **o))),
        }
        found.append(Work(name, f"Decode, {title}, 12 layers", contenders, STEPS))
    return found


def remembering(net: LanguageModel, time: int) -> Any:
    """A state after so many tokens: caches hold random numbers, with room for what follows."""
    made = []
    for block, layer in zip(net.blocks, net.initial_state(1).layers):
        if isinstance(block.mixer, Attention):
            mixer = block.mixer
            cache = [torch.randn(1, time + 4096, mixer.n_kv_heads, mixer.head_dim) for _ in range(2)]
            layer = layer._replace(mixer=ops.KVCache(*cache, torch.tensor([time])))
        made.append(layer)
    return type(net.initial_state(1))(tuple(made))


def context() -> list[Work]:
    """Decoding far into a text: Mamba against the transformer of the same size, both ours."""
    found = []
    for time, target in ((8192, 4.0), (32768, 12.0)):

        def transformer(time: int = time) -> Run:
            net = packed("fp32", "attention*12")
            return stepper(net, remembering(net, time))

        contenders = {
            "mamba fp32": Contender(lambda: stepper(packed("fp32"))),
            "attention with a cache, fp32": Contender(transformer, target),
        }
        found.append(Work(f"context-{time}", f"Decode at a context of {time}", contenders, STEPS))
    return found


def memory() -> list[Work]:
    """Bytes that a sequence of 32768 tokens leaves."""

    def bytes_of(layout: str) -> Run:
        net = model(layout)
        return lambda: sum(block.mixer.state_nbytes(32768) for block in net.blocks)

    contenders = {
        "mamba": Contender(lambda: bytes_of(f"mamba*{LAYERS}")),
        "attention": Contender(lambda: bytes_of("attention*12"), 100),
    }
    return [Work("memory", "State after 32768 tokens", contenders, unit="bytes")]


GROUPS: dict[str, Callable[[], list[Work]]] = {
    "decode": decode,
    "prompt": prompt,
    "prefill": prefill,
    "train": train,
    "products": products,
    "scan": scan,
    "wkv": wkv,
    "mixing": mixing,
    "rwkv": rwkv,
    "context": context,
    "memory": memory,
}
