import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import shared

from bestiary import BestiaryError, UsageError
from bestiary.data import samples
from bestiary.data.labelled import Labelled, LabelledBatches, split


def numbers(n: int = 10) -> Labelled:
    return Labelled(torch.arange(float(n))[:, None], torch.arange(n))


def test_an_epoch_holds_each_example_once_and_the_next_in_another_order() -> None:
    batches = LabelledBatches(numbers(), 4, seed=3)
    seen = torch.cat([batches.global_batch(step)[1] for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batches.global_batch(2)[0], batches.global_batch(2)[0])
    inputs, labels, more = batches.global_batch(1)
    assert inputs[:, 0].tolist() == labels.tolist() and not more


def test_token_rows_are_padded_and_come_with_their_lengths() -> None:
    rows = (torch.tensor([1, 2, 3]), torch.tensor([4]))
    data = Labelled(rows, torch.tensor([0, 1]), (torch.tensor([0, 0, 1]), torch.tensor([0])))
    inputs, labels, more = data.rows([1, 0])
    assert inputs.tolist() == [[4, 0, 0], [1, 2, 3]] and labels.tolist() == [1, 0]
    assert more["lengths"].tolist() == [1, 3] and more["token_types"].tolist() == [[0, 0, 0], [0, 0, 1]]


def test_a_split_leaves_nothing_out_and_is_the_same_again() -> None:
    train, test = split(numbers(), 0.3, seed=1)
    assert sorted([*train.labels.tolist(), *test.labels.tolist()]) == list(range(10)) and len(test) == 3
    assert torch.equal(split(numbers(), 0.3, seed=1)[1].labels, test.labels)
    assert train.inputs[:, 0].tolist() == train.labels.tolist()
    with pytest.raises(UsageError, match="cannot hold out"):
        split(numbers(2), 0.01)
    with pytest.raises(UsageError, match="at least one"):
        Labelled(torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_idx_files_are_read_gzipped_or_not_and_damage_is_named(tmp_path: Path) -> None:
    images = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels").write_bytes(gzip.compress(idx(np.arange(5))))
    assert np.array_equal(samples.read_idx(tmp_path / "images"), images)
    train, test = samples.mnist(tmp_path / "images", tmp_path / "labels", held_out=0.4)
    assert train.inputs.shape == (3, 2, 3) and len(test) == 2
    assert train.inputs.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.inputs.std().item() == pytest.approx(1, abs=1e-6)
    for content, message in ((idx(images)[:-1], "damaged"), (b"hello", "no idx file"), (b"\x1f\x8b\0", "not readable")):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(BestiaryError, match=f"bad.*{message}"):
            samples.read_idx(tmp_path / "bad")


def test_mnists_own_files() -> None:
    folder = shared("eval/mnist_t10k")
    train, test = samples.mnist(*(folder / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")))
    assert train.inputs.shape == (8000, 28, 28) and len(test) == 2000 and train.n_classes == 10


def test_packages_make_their_sets_offline_and_leave_random_numbers_alone() -> None:
    pytest.importorskip("mnist1d", reason="an extra: pip install 'bestiary[samples]'")
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    train, test = samples.mnist1d()
    assert train.inputs.shape == (4000, 40, 1) and test.inputs.shape == (1000, 40, 1) and train.n_classes == 10
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="an extra: pip install 'bestiary[samples]'")
    train, test = samples.digits()
    assert train.inputs.shape == (1438, 8, 8) and test.inputs.shape == (359, 8, 8) and train.n_classes == 10


def test_without_the_package_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"scikit-learn: pip install 'bestiary\[samples\]'"):
        samples.digits()
