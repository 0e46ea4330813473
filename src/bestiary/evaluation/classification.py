"""How often a classifier is right, and how much better than chance."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary.data.labelled import Labelled
from bestiary.errors import UsageError
from bestiary.models import SequenceClassifier


@torch.no_grad()
def class_logits(model: SequenceClassifier, data: Labelled, batch_size: int = 64) -> Float[Tensor, "rows classes"]:
    """The logits of every example, in order."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        found = []
        for start in range(0, len(data), batch_size):
            inputs, _, more = data.rows(range(start, min(start + batch_size, len(data))))
            found.append(model(inputs.to(device), **{key: value.to(device) for key, value in more.items()}).cpu())
        return torch.cat(found)
    finally:
        model.train(was_training)


def classification_score(model: SequenceClassifier, data: Labelled, batch_size: int = 64) -> dict[str, float]:
    """Mean nats, accuracy and Matthews correlation on examples."""
    logits = class_logits(model, data, batch_size)
    predicted = logits.argmax(1)
    return {
        "loss": F.cross_entropy(logits.double(), data.labels).item(),
        "accuracy": accuracy(predicted, data.labels),
        "matthews": matthews(predicted, data.labels),
    }


def accuracy(predicted: Int[Tensor, " rows"], labels: Int[Tensor, " rows"]) -> float:
    """Share of right predictions."""
    if not len(labels):
        raise UsageError("no examples to judge")
    return (predicted == labels).double().mean().item()


def matthews(predicted: Int[Tensor, " rows"], labels: Int[Tensor, " rows"]) -> float:
    """Matthews correlation (for more than two classes Gorodkin's R_K): 1 all right, 0 no better than chance.

    0, too, where one side holds a single class.
    """
    n = int(max(predicted.max(), labels.max())) + 1
    table = torch.zeros(n, n, dtype=torch.float64)
    table.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    total, seen, said = table.sum(), table.sum(1), table.sum(0)
    spread = (total**2 - seen @ seen) * (total**2 - said @ said)
    return ((table.trace() * total - seen @ said) / spread.sqrt()).item() if spread > 0 else 0.0
