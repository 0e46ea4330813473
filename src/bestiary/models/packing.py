"""Models for decoding alone: their matrices packed once for the compiled kernels, in fp32, bf16, int8 or int4.

Everything else is the model itself: the same mixers, states and generation, in fp32. Few rows (a step of a small batch)
go through a kernel that reads each weight once; prompts go through dense products.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.mixers.base import Mixer
from bestiary.mixers.mamba import Mamba, MambaState
from bestiary.models.loss import Head, logit_nats
from bestiary.ops.native.mamba_layer import MambaLayer, Parts
from bestiary.ops.native.matvec import FEW_ROWS, PackedMatrix

if TYPE_CHECKING:
    from bestiary.models.language_model import LanguageModel


class PackedLinear(nn.Module):
    """A linear map whose matrix is packed; without a gradient. `weight` is empty: it tells type and device."""

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return self.matrix.multiply(x)


class PackedMambaBlock(nn.Module):
    """A layer that is Mamba alone: segments go through the block as it is, a step of few rows is one native call."""

    def __init__(self, block: Any, eps: float):
        super().__init__()
        self.block, mixer = block, block.mixer
        dt_proj = PackedMatrix(mixer.dt_proj.weight, "fp32", mixer.dt_proj.bias)
        matrices = (mixer.in_proj.matrix, mixer.x_proj.matrix, dt_proj, mixer.out_proj.matrix)
        with torch.no_grad():
            rest = (block.norm.weight, mixer.conv.weight, mixer.conv.bias, -mixer.A_log.exp(), mixer.D)
            self.layer = MambaLayer(Parts(*matrices, *rest), eps)

    @property
    def mixer(self) -> Any:
        """The block's."""
        return self.block.mixer

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether the native step is what this block computes."""
        mixer = block.mixer
        plain = type(mixer) is Mamba and mixer.discretisation == "euler" and not mixer.norms
        return plain and block.channel is None and isinstance(block.norm, nn.RMSNorm)

    def initial_state(self, batch_size: int, **place: Any) -> Any:
        return self.block.initial_state(batch_size, **place)

    def forward(self, *given: Any, **rows: Any) -> Any:
        return self.block(*given, **rows)

    def step(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Any]:
        """One step of every row through the layer."""
        mixed = state.mixer
        if len(x) > FEW_ROWS or context.intervals is not None or mixed.h.dtype != torch.float32:
            return self.block.step(x, state, context)
        y, history, h = self.layer.step(x, mixed.history, mixed.h)
        return y, state._replace(mixer=MambaState(history, h))


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


class PackedEmbedding(nn.Module):
    """A table that is the packed head's matrix: rows are unpacked as they are asked for."""

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        rows = [self.matrix.rows(token, 1) for token in tokens.flatten().tolist()]
        table = torch.cat(rows) if rows else torch.empty(0, self.matrix.shape[1])
        return table.reshape(*tokens.shape, -1)


def packed(model: "LanguageModel", weights: str) -> "LanguageModel":
    """A model that computes what `model` does, with packed weights; it can be neither trained nor saved.

    Args:
        weights: "fp32", "bf16", "int8" or "int4"; all but the first round the weights.

    Raises UsageError where there are no compiled kernels, or the model is not on the CPU.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UsageError("packed weights are for the CPU: move the model there first, with model.cpu()")
    found: dict[int, PackedMatrix] = {}
    result = _converted(model, weights, found).eval()
    eps = model.config.norm_eps
    blocks = (PackedMambaBlock(block, eps) if PackedMambaBlock.fits(block) else block for block in result.blocks)
    result.blocks = nn.ModuleList(blocks)
    if model.config.tie_embeddings:
        result.embedding = PackedEmbedding(found[id(model.head)])
    return result.requires_grad_(False)


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, packed ones included, shared ones once."""
    matrices = {id(m.matrix): m.matrix for m in model.modules() if isinstance(m, (PackedLinear, PackedEmbedding))}
    return sum(p.nbytes for p in model.parameters()) + sum(matrix.nbytes for matrix in matrices.values())


def _converted(module: Any, weights: str, found: dict[int, PackedMatrix]) -> Any:
    """A copy of a module whose linear maps are packed and whose other parameters are in fp32."""
    clone = copy.copy(module)
    clone._parameters, clone._buffers, clone._modules = {}, dict(module._buffers), {}
    for name, parameter in module._parameters.items():
        clone._parameters[name] = None if parameter is None else _wide(parameter)
    kept = module.unpacked if isinstance(module, Mixer) else ()
    for name, child in module._modules.items():
        if isinstance(child, nn.Linear) and name not in kept and not getattr(child, "is_filter", False):
            matrix = found.setdefault(id(child), PackedMatrix(child.weight, weights, child.bias))
            clone._modules[name] = PackedHead(matrix, child.cap) if isinstance(child, Head) else PackedLinear(matrix)
        else:
            clone._modules[name] = None if child is None else _converted(child, weights, found)
    return clone


def _wide(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
    return nn.Parameter(parameter.detach().float(), requires_grad=False)
