import math

import pytest
import torch

from bestiary import ClassifierConfig, SequenceClassifier
from bestiary.data.labelled import Labelled
from bestiary.evaluation import accuracy, classification_score, matthews
from bestiary.evaluation.classification import class_logits


def test_matthews_correlation_is_the_formula_of_the_four_counts() -> None:
    predicted, labels = (torch.randint(2, (50,)) for _ in range(2))
    tp, tn = ((predicted == c) & (labels == c) for c in (1, 0))
    fp, fn = (predicted == 1) & (labels == 0), (predicted == 0) & (labels == 1)
    tp, tn, fp, fn = (int(x.sum()) for x in (tp, tn, fp, fn))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predicted, labels) == pytest.approx(expected, rel=1e-12)


def test_matthews_correlation_at_its_ends() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    assert matthews(labels, labels) == pytest.approx(1.0)
    assert matthews(torch.zeros(4, dtype=torch.int64), labels) == 0.0
    assert matthews(1 - labels[[0, 1, 0, 1]], labels[[0, 1, 0, 1]]) == pytest.approx(-1.0)
    assert accuracy(torch.tensor([0, 1, 1, 1]), labels) == 0.75


def test_the_score_does_not_depend_on_batches() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(ClassifierConfig("encoder_attention", 32, vocab_size=40, dropout=0.5, n_classes=3))
    data = Labelled(tuple(torch.randint(40, (n,)) for n in (3, 9, 1, 12, 5)), torch.tensor([0, 1, 2, 1, 0]))
    one, all_at_once = class_logits(model, data, 1), class_logits(model, data, 64)
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(all_at_once, data.labels).item()
    assert classification_score(model, data)["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.training
