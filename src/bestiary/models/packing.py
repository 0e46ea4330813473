"""Models for decoding alone: their matrices packed once for the compiled kernels, in fp32, bf16, int8 or int4.

Everything else is the model itself: the same mixers, states and generation, in fp32. Few rows (a step of a small batch)
go through a kernel that reads each weight once; prompts go through dense products.
"""

import copy
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary.decoding import Decoder
from bestiary.errors import UsageError
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, Remembered
from bestiary.models.loss import Head, logit_nats
from bestiary.ops.native.matvec import PackedMatrix

if TYPE_CHECKING:
    from bestiary.models.language_model import LanguageModel


Read = Callable[[str], Tensor]


class Packed(nn.Module):
    """What has a packed matrix, without a gradient. `weight` is empty: it tells type and device."""

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)


class PackedLinear(Packed):
    """A linear map whose matrix is packed."""

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.matrix.multiply(x)


class PackedHead(PackedLinear):
    """The map to logits, with its cap."""

    def __init__(self, matrix: PackedMatrix, cap: float | None):
        super().__init__(matrix)
        self.cap = cap

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        logits = super().forward(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def nats(self, hidden: Float[Tensor, "rows d_model"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Cross-entropy of each target in nats; 0 where the target is below 0."""
        parts = zip(hidden.split(256), targets.split(256))
        return torch.cat([logit_nats(self(h), t) for h, t in parts]) if len(hidden) else hidden.new_zeros(0)

    def loss(self, *given: Any) -> Tensor:
        """There is none: a packed model has no gradients."""
        raise UsageError("a packed model cannot be trained, and has no loss: take the model itself, or bestiary eval")


class PackedEmbedding(Packed):
    """A table that is packed, perhaps as the head's matrix: rows are unpacked as they are asked for."""

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        return self.matrix.gather(tokens)


def packed(model: "LanguageModel", weights: str, read: Read | None = None) -> "LanguageModel":
    """A model that computes what `model` does, with packed weights; it can be neither trained nor saved.

    It shares no numbers and no hooks with `model`, which may go on to change.

    Args:
        weights: "fp32", "bf16", "int8" or "int4"; all but the first round the weights.
        read: gives each parameter by its name, once; the model may then be one on the meta device, without numbers. One
            tensor at a time is held unrounded, so a model needs little more memory than its packed weights.

    Raises UsageError where there are no compiled kernels, or the model is not on the CPU. Warns of each linear map that
    an adapter, a hook or a parametrisation took over: it runs as it is.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise UsageError("this model is packed already: pack the one that it was made of")
    if read is None:
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise UsageError("packed weights are for the CPU: move the model there first, with model.cpu()")
        parameters = dict(model.named_parameters())
        read = parameters.__getitem__
    packing = _Packing(model, weights, read)
    result = packing.result()
    for note in packing.notes:
        warnings.warn(note, stacklevel=3)
    return result


def check_plain(model: nn.Module) -> None:
    """One clear error for a packed model where its weights as numbers are wanted."""
    if any(isinstance(module, Packed) for module in model.modules()):
        raise UsageError("a packed model cannot be saved: save the model that it was made of")


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, packed ones included, shared ones once."""
    matrices = {id(module.matrix): module.matrix for module in model.modules() if isinstance(module, Packed)}
    return sum(p.nbytes for p in model.parameters()) + sum(matrix.nbytes for matrix in matrices.values())


PACKABLE: tuple[type[nn.Module], ...] = (nn.Linear, Linear, Head)
"""Linear maps whose forward pass is known: these classes alone, and none that is derived from them."""


def _why_not(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why a module may compute something else than its class does, or is of another class; None where it is known."""
    if type(module) not in kinds:
        return f"it is a {type(module).__name__}, not a {' or '.join(kind.__name__ for kind in kinds)} itself"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    return "its forward pass was replaced" if "forward" in vars(module) else None


def _copied(module: Any) -> Any:
    """A module with the same attributes, its collections (of hooks, too) copied; parametrised ones refuse copy.copy."""
    if isinstance(module, Remembered):
        return Remembered()
    clone = module.__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, types.MethodType) and value.__self__ is module:  # a method that was put on this module
            value = types.MethodType(value.__func__, clone)
        vars(clone)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    return clone


class _Packing:
    """One model on its way: its parameters' names, and what is packed already (layers may share it)."""

    def __init__(self, model: "LanguageModel", weights: str, read: Read):
        self.model, self.weights, self.read = model, weights, read
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.modules: dict[int, Any] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.buffers: dict[int, Tensor] = {}
        self.notes: list[str] = []

    def result(self) -> "LanguageModel":
        embedding = self.model.embedding
        known = self._known("embedding", embedding, (nn.Embedding,))
        if known:
            self.modules[id(embedding)] = None  # until the head, which it may be, is packed
        result = self.convert(self.model).eval()
        if known:
            shared = isinstance(result.head, PackedHead) and self.model.head.weight is embedding.weight
            result.embedding = PackedEmbedding(result.head.matrix if shared else self._table(embedding.weight))
        result.requires_grad_(False)
        result.decoder = Decoder(result)
        return result

    def convert(self, module: Any, prefix: str = "") -> Any:
        """A copy of a module whose linear maps are packed and whose other parameters are in fp32."""
        clone = _copied(module)
        clone._parameters, clone._buffers, clone._modules = {}, {}, {}
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in self.buffers:
                self.buffers[id(buffer)] = buffer.detach().clone()
            clone._buffers[name] = None if buffer is None else self.buffers[id(buffer)]
        for name, parameter in module._parameters.items():
            clone._parameters[name] = None if parameter is None else self._wide(parameter)
        kept = module.unpacked if isinstance(module, Mixer) else ()
        for name, child in module._modules.items():
            if child is not None and id(child) not in self.modules:
                full = prefix + name
                linear = isinstance(child, nn.Linear) and name not in kept and not getattr(child, "is_filter", False)
                known = linear and self._known(full, child, PACKABLE)
                self.modules[id(child)] = self._pack(child) if known else self.convert(child, full + ".")
            clone._modules[name] = None if child is None else self.modules[id(child)]
        return clone

    def _known(self, name: str, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
        """Whether a module can be packed; one that an adapter took over is said to stay as it is."""
        why_not = _why_not(module, kinds)
        if why_not is not None:
            self.notes.append(f"{name} is not packed but runs as it is, in fp32: {why_not}")
        return why_not is None

    def _table(self, weight: Tensor) -> PackedMatrix:
        """An embedding of its own: its rows are looked up, not multiplied, so that bf16 costs little."""
        return PackedMatrix(self._read(weight), self.weights if self.weights in ("fp32", "bf16") else "bf16")

    def _pack(self, linear: Any) -> PackedLinear:
        bias = None if linear.bias is None else self._read(linear.bias)
        matrix = PackedMatrix(self._read(linear.weight), self.weights, bias)
        return PackedHead(matrix, linear.cap) if isinstance(linear, Head) else PackedLinear(matrix)

    def _read(self, parameter: Tensor) -> Tensor:
        return self.read(self.names[id(parameter)]).detach()

    def _wide(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self.parameters:
            own = self._read(parameter).to(torch.float32, copy=True)
            self.parameters[id(parameter)] = nn.Parameter(own, requires_grad=False)
        return self.parameters[id(parameter)]
