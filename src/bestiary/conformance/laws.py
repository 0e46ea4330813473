"""The laws, each a function of a case that returns how far it is from holding (0 = exactly).

Two states count as equal when they continue alike: their tensors may differ (a running maximum, a buffer's slack).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestiary import state as states
from bestiary.conformance.case import Case
from bestiary.conformance.tolerances import TOLERANCE
from bestiary.errors import UsageError
from bestiary.mixers.base import Mixer


class LawBroken(AssertionError):
    """A law fails in a way that no number measures."""


@dataclass(frozen=True)
class Law:
    """A claim, the function that measures the deviation from it, and the largest deviation that arithmetic explains."""

    name: str
    claim: str
    deviation: Callable[[Case], float]
    tolerance: float
    causal_only: bool = True
    """Whether it holds for causal mixers alone (bidirectional ones have no state and no step)."""
    examples: int | None = None
    """Most cases that are tried, where one takes long."""


LAWS: list[Law] = []


def law(
    claim: str,
    *,
    tolerance: float = TOLERANCE["float64", "law"],
    causal_only: bool = True,
    examples: int | None = None,
) -> Callable:
    """Decorator: adds the function to the laws."""

    def add(function: Callable[[Case], float]) -> Callable[[Case], float]:
        LAWS.append(Law(function.__name__, claim, function, tolerance, causal_only, examples))
        return function

    return add


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite for other shapes or values that are not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(expected.double().abs().max().item(), 1e-2) if error == error else float("inf")


def continuation(mixer: Mixer, state: Any, case: Case, time: int = 6) -> Tensor:
    """What a mixer says next: its outputs on further random inputs."""
    return mixer(case.inputs(time, batch=_rows(state, case.batch), salt=99), state)[0]


def _rows(state: Any, default: int) -> int:
    found = states.tensors(state)
    return found[0].shape[0] if found else default


@law("forward = step by step")
def stepwise(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    with torch.no_grad():
        whole, end = mixer(x)
        state, outputs = mixer.initial_state(case.batch, dtype=case.dtype), []
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            outputs.append(y_t)
        stepped = torch.stack(outputs, 1) if outputs else x
        return max(distance(stepped, whole), distance(continuation(mixer, state, case), continuation(mixer, end, case)))


@law("steps that write in place = steps that do not")
def in_place(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs(case.time + 5)
    with torch.no_grad():
        expected, _ = mixer(x)
        y, state = mixer(x[:, : case.time])
        outputs, state = [y], states.fork(state)
        with states.in_place():
            for x_t in x[:, case.time :].unbind(1):
                y_t, state = mixer.step(x_t, state)
                outputs.append(y_t[:, None])
        return distance(torch.cat(outputs, 1), expected)


@law("forward = forward over any split")
def split(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    with torch.no_grad():
        whole, end = mixer(x)
        state, outputs = None, []
        for segment in case.segments:
            y, state = mixer(x[:, segment], state)
            outputs.append(y)
        return max(
            distance(torch.cat(outputs, 1), whole),
            distance(continuation(mixer, state, case), continuation(mixer, end, case)),
        )


@law("gradients of a whole = gradients over any split, through the state that is handed over")
def split_gradients(case: Case) -> float:
    def gradients(segments: list[slice]) -> list[Tensor]:
        mixer, x = case.mixer(), case.inputs().requires_grad_()
        state, loss = None, x.sum() * 0
        for segment in segments:
            y, state = mixer(x[:, segment], state)
            loss = loss + (y * case.inputs(salt=5)[:, segment]).sum()
        ahead = continuation(mixer, state, case)  # what the last state does counts too
        loss = loss + (ahead * case.inputs(ahead.shape[1], salt=6)).sum()
        wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found)]

    whole, parts = gradients([slice(0, case.time)]), gradients(case.segments)
    largest = max((g.abs().max().item() for g in whole if g.numel()), default=0.0)
    floor = max(1e-6 * largest, 1e-2)  # a gradient that is noise beside the others need not agree in every digit
    return max(
        (distance(p, w) if w.numel() and w.abs().max() > floor else _absolute(p, w) / max(largest, 1e-2))
        for p, w in zip(parts, whole)
    )


@law(
    "gradients are the derivatives, by central differences in float64",
    tolerance=TOLERANCE["float64", "derivative"],
    causal_only=False,
)
def derivative(case: Case) -> float:
    case = replace(case, strong=False)
    mixer, x = case.mixer(), case.inputs().requires_grad_()
    wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    weight, cut = case.inputs(salt=5), case.cuts[0]

    def loss() -> Tensor:  # over two segments, so that the state's part is in it
        if not mixer.causal:
            return (mixer(x)[0] * weight).sum()
        y, state = mixer(x[:, :cut])
        z, state = mixer(x[:, cut:], state)
        ahead = continuation(mixer, state, case)
        return (torch.cat([y, z], 1) * weight).sum() + ahead.square().sum()

    start = loss() + x.sum() * 0  # a sequence of no steps has no gradients, which is none at all without this
    found = torch.autograd.grad(start, wanted, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found)]
    generator = torch.Generator().manual_seed(case.seed)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in wanted]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions))
    size, epsilon, values, place = sum(float(g.square().sum()) for g in gradients) ** 0.5, 1e-5, {}, 0.0
    with torch.no_grad():
        for step in (1.0, 0.5, -0.5, -1.0):
            for p, d in zip(wanted, directions):
                p.add_((step - place) * epsilon * d)
            values[step], place = loss().item(), step
    wide, narrow = ((values[step] - values[-step]) / (2 * step * epsilon) for step in (1.0, 0.5))
    found_slope = (4 * narrow - wide) / 3  # Richardson: the third derivative cancels
    return abs(found_slope - expected) / max(abs(expected), size, 1e-2)


def _absolute(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item() if expected.numel() else 0.0


@law("the future changes nothing")
def causality(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    worst = 0.0
    with torch.no_grad():
        expected, _ = mixer(x)
        for cut in case.cuts:
            changed = torch.cat([x[:, :cut], case.inputs(salt=3)[:, cut:]], 1)
            worst = max(worst, distance(mixer(changed)[0][:, :cut], expected[:, :cut]))
    return worst


@law("a right-padded batch = each row alone, whatever the padding holds", causal_only=False)
def padding(case: Case) -> float:
    mixer, lengths = case.mixer(), case.lengths()
    before = case.inputs(4, salt=1)  # a history, so that a row of length 0 has a state to keep
    x = case.inputs()
    padded = x.clone()
    for row, length in enumerate(lengths.tolist()):
        padded[row, length:] = float("nan")
    worst = 0.0
    with torch.no_grad():
        start = mixer(before)[1] if mixer.causal else None
        y, end = mixer(padded, start, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            own = states.select(start, row) if start is not None else None
            alone, own_end = mixer(x[row : row + 1, :length], own)
            worst = max(worst, distance(y[row : row + 1, :length], alone), y[row, length:].abs().sum().item())
            if mixer.causal:
                one = replace(case, batch=1)
                kept = states.select(end, row)
                ahead = continuation(mixer, kept, one)
                worst = max(worst, distance(ahead, continuation(mixer, own_end, one)))
                if length == 0 and not torch.equal(ahead, continuation(mixer, own, one)):
                    raise LawBroken("a row of length 0 changed its state")
    return worst


@law("gradients of a padded batch = gradients of each row alone", causal_only=False)
def padding_gradients(case: Case) -> float:
    lengths = case.lengths()
    weight = case.inputs(salt=4)

    def gradients(padded: bool) -> list[Tensor]:
        mixer, x = case.mixer(), case.inputs()
        total = x.sum() * 0
        if padded:
            for row, length in enumerate(lengths.tolist()):
                x[row, length:] = float("nan")
            y, _ = mixer(x, lengths=lengths)
            total = total.nan_to_num() + (y * weight).sum()
        else:
            for row, length in enumerate(lengths.tolist()):
                total = total + (mixer(x[row : row + 1, :length])[0] * weight[row : row + 1, :length]).sum()
        wanted = [p for p in mixer.parameters() if p.requires_grad]
        if not total.requires_grad:
            return [torch.zeros_like(p) for p in wanted]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found)]

    alone, together = gradients(False), gradients(True)
    largest = max((g.abs().max().item() for g in alone if g.numel()), default=0.0)
    if not all(g.isfinite().all() for g in together):
        return float("inf")
    return max((_absolute(p, w) / max(largest, 1e-2) for p, w in zip(together, alone)), default=0.0)


@law("packed documents = each document alone", causal_only=False)
def packing(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs(batch=1)
    cu_seqlens = torch.tensor([0, *case.cuts, case.time])
    worst = 0.0
    with torch.no_grad():
        y, end = mixer(x, cu_seqlens=cu_seqlens)
        ahead = continuation(mixer, end, replace(case, batch=len(case.segments))) if mixer.causal else None
        for row, segment in enumerate(case.segments):
            alone, own_end = mixer(x[:, segment])
            worst = max(worst, distance(y[:, segment], alone))
            if mixer.causal and ahead is not None:
                further = case.inputs(6, batch=len(case.segments), salt=99)[row : row + 1]
                worst = max(worst, distance(ahead[row : row + 1], mixer(further, own_end)[0]))
    return worst


@law("a fork, and a state rolled back to, continue as if nothing had happened", tolerance=0.0)
def fork(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    with torch.no_grad():
        _, state = mixer(x)
        branch = states.fork(state)
        expected = continuation(mixer, state, case)
        mixer(case.inputs(7, salt=8), state)  # neither a further segment ...
        with states.in_place():  # ... nor a branch that writes into its own copy touches the state
            for x_t in case.inputs(5, salt=9).unbind(1):
                _, branch = mixer.step(x_t, branch)
        return distance(continuation(mixer, state, case), expected)


@law("selecting and stacking states = batching, at different positions too")
def batching(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    with torch.no_grad():
        ends = [min(case.time, case.cuts[0] + 3 * row) for row in range(case.batch)]
        alone = [mixer(x[row : row + 1, :end])[1] for row, end in enumerate(ends)]
        joined = states.stack(alone)
        further = case.inputs(9, salt=2)
        together, end = mixer(further[:, :6], joined)
        for step in range(6, 9):
            y_t, end = mixer.step(further[:, step], end)
            together = torch.cat([together, y_t[:, None]], 1)
        worst = 0.0
        for row in range(case.batch):
            expected, _ = mixer(further[row : row + 1], alone[row])
            again, _ = mixer(further[row : row + 1], states.select(joined, [row]))
            worst = max(worst, distance(together[row : row + 1], expected), distance(again, expected))
        return worst


@law("a state saved and loaded continues bit for bit", tolerance=0.0)
def saving(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, state = mixer(x)
        states.save(state, Path(folder) / "state.safetensors")
        loaded = states.load(Path(folder) / "state.safetensors")
        if type(loaded) is not type(state):
            raise LawBroken(f"saved a {type(state).__name__}, loaded a {type(loaded).__name__}")
        return distance(continuation(mixer, loaded, case), continuation(mixer, state, case))


@law("the state is as large as declared: constant, or linear in time up to a bound", tolerance=0.0)
def state_size(case: Case) -> float:
    case = replace(case, dtype=torch.float32)
    mixer = case.mixer()
    with torch.no_grad():
        for time in (0, 1, 3, case.time):
            x = case.inputs(time)
            _, after = mixer(x)
            stepped = mixer.initial_state(case.batch, dtype=case.dtype)
            for x_t in x.unbind(1):
                _, stepped = mixer.step(x_t, stepped)
            declared = mixer.state_nbytes(time)
            for how, found in (("forward", states.nbytes(after)), ("steps", states.nbytes(stepped))):
                if found != declared * case.batch:
                    raise LawBroken(f"{declared} bytes declared at {time}, {found / case.batch:g} found after {how}")
        first, second, third = (mixer.state_nbytes(10**6 * n) for n in (1, 2, 3))
        if third - second != second - first:
            raise LawBroken("the declared size is neither constant nor linear in time")
    return 0.0


def decode(case: Case, steps: int) -> float:
    """0 if `steps` steps of decoding in fp32 stay finite, in outputs and state; infinite otherwise."""
    case = replace(case, dtype=torch.float32, batch=1)
    mixer = case.mixer()
    state = mixer.initial_state(1, dtype=torch.float32)
    finite = torch.tensor(True)
    with torch.no_grad(), states.in_place():
        for x_t in case.inputs(min(steps, 500)).unbind(1) if steps <= 500 else _cycle(case, steps):
            y_t, state = mixer.step(x_t, state)
            finite = finite & y_t.isfinite().all()
    finite = finite & torch.stack([torch.tensor(True), *(t.isfinite().all() for t in states.tensors(state))]).all()
    return 0.0 if finite else float("inf")


def _cycle(case: Case, steps: int) -> Any:
    x = case.inputs(500).unbind(1)
    return (x[i % 500] for i in range(steps))


@law("2,000 steps of decoding at strong gates stay finite", tolerance=0.0, examples=1)
def long_decode(case: Case) -> float:
    return decode(replace(case, strong=True), 2000)


@law("float64 in, float64 throughout; under bf16 the state stays in fp32 and the output in bf16", causal_only=False)
def dtypes(case: Case) -> float:
    with torch.no_grad():
        for dtype, kept in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, None)):
            case = replace(case, dtype=dtype)
            mixer, x = case.mixer(), case.inputs()
            y, state = mixer(x)
            if y.dtype != dtype:
                raise LawBroken(f"{dtype} in, {y.dtype} out")
            for field, tensor in _fields(state):
                cached = kept is None and field in mixer.cached_activations
                if tensor.is_floating_point() and tensor.dtype != (kept or (dtype if cached else torch.float32)):
                    raise LawBroken(f"under {dtype} the state's {field} is {tensor.dtype}")
                if tensor.is_complex():
                    raise LawBroken(f"the state's {field} is complex: keep real pairs, which can be saved")
        if mixer.causal:
            start = mixer.initial_state(3, device="meta", dtype=torch.float32)
            if any(t.device.type != "meta" or t.shape[0] != 3 for t in states.tensors(start)):
                raise LawBroken("initial_state ignores its device or batch size")
    return 0.0


def _fields(state: Any, name: str = "state") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(name, state)]
    names = getattr(state, "_fields", range(len(state)))
    return [found for key, part in zip(names, state) for found in _fields(part, str(key))]


@law(
    "fp32 is float64 within rounding, whole and step by step", tolerance=TOLERANCE["float32", "law"], causal_only=False
)
def single_precision(case: Case) -> float:
    case = replace(case, strong=False, time=max(case.time, 1))
    with torch.no_grad():
        expected, _ = case.mixer()(case.inputs())
        low = replace(case, dtype=torch.float32)
        mixer, x = low.mixer(), low.inputs()
        whole, _ = mixer(x)
        if not mixer.causal:
            return distance(whole, expected)
        state, outputs = mixer.initial_state(low.batch, dtype=torch.float32), []
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            outputs.append(y_t)
        return max(distance(whole, expected), distance(torch.stack(outputs, 1), expected))


@law(
    "bf16, as weights or by autocast, is float64 within its rounding",
    tolerance=TOLERANCE["bfloat16", "law"],
    causal_only=False,
)
def half_precision(case: Case) -> float:
    short = max(
        case.time, 1
    )  # a single step may come out near zero, and no relative error be small: so many are measured
    case = replace(case, strong=False, time=max(short, 16))
    with torch.no_grad():
        low = replace(case, dtype=torch.bfloat16)
        mixer, x = low.mixer(), low.inputs()
        expected, _ = mixer.double()(x.double())  # the same rounded weights and inputs: only the arithmetic differs

        def beginning(y: Tensor) -> float:
            return distance(torch.cat([y.double(), expected[:, y.shape[1] :]], dim=1), expected)

        whole = beginning(low.mixer()(x)[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, state = mixer.float()(x.float())
        if any(t.dtype in (torch.bfloat16, torch.float16) for t in states.tensors(state)):
            raise LawBroken("under autocast the state fell to half precision")
        whole = max(whole, beginning(cast))
        if not mixer.causal:
            return whole
        stepped, _ = low.mixer().step(x[:, 0], mixer.initial_state(low.batch, dtype=torch.bfloat16))
        return max(whole, beginning(low.mixer()(x[:, :short])[0]), beginning(stepped[:, None]))


@law("a bidirectional mixer remembers nothing and refuses to step", tolerance=0.0, causal_only=False)
def no_state(case: Case) -> float:
    mixer = case.mixer()
    if mixer.causal:
        return 0.0
    with torch.no_grad():
        _, state = mixer(case.inputs())
    if states.tensors(state) or states.tensors(mixer.initial_state(case.batch)) or mixer.state_nbytes(case.time):
        raise LawBroken("a bidirectional mixer keeps a state")
    try:
        mixer.step(case.inputs(1)[:, 0], state)
    except UsageError:
        return 0.0
    raise LawBroken("a bidirectional mixer steps")


@law("bad lengths and bounds are one clear error", tolerance=0.0, causal_only=False)
def refusals(case: Case) -> float:
    mixer, x = case.mixer(), case.inputs(4, batch=2)
    wrong: list[dict[str, Any]] = [
        {"lengths": torch.tensor([1, 5])},
        {"lengths": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 4])},
        {"cu_seqlens": torch.tensor([0, 4])},
    ]
    for arguments in wrong:
        try:
            mixer(x, **arguments)
        except UsageError:
            continue
        if "cu_seqlens" in arguments and "lengths" not in arguments and not states.tensors(mixer(x)[1]):
            continue  # a part that treats each step alone needs no bounds
        raise LawBroken(f"accepts {arguments} for inputs of shape {tuple(x.shape)}")
    return 0.0
