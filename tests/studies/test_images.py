"""The study of image classifiers: what it trains, compares and writes, on images that a child could tell apart."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bestiary import UsageError
from bestiary.data.labelled import Labelled
from bestiary.studies import images
from bestiary.studies.images import ImageStudy, baselines, default_layouts, run, verdict

RIGHT, WRONG = torch.ones(2, 400, dtype=torch.bool), torch.zeros(2, 400, dtype=torch.bool)


def bars(folder: Path, count: int = 120) -> str:
    """A folder of idx files: 4 x 4 images with a bright upper or lower half."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    pixels = rng.integers(0, 60, (count, 4, 4))
    pixels[labels == 0, :2] += 180
    pixels[labels == 1, 2:] += 180
    for name, array in (("train-images-idx3-ubyte.gz", pixels), ("train-labels-idx1-ubyte.gz", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return str(folder)


def test_a_study_compares_two_models_and_writes_what_it_found(tmp_path: Path) -> None:
    layouts = ("bidirectional{mixer=gru, channel=none}", "encoder_attention")
    study = ImageStudy(
        bars(tmp_path), layouts, 32, patch=2, epochs=6, seeds=2, batch_size=16, folder=str(tmp_path / "out")
    )
    lines: list[str] = []
    result = run(study, lines.append)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert tuple(result["models"]) == layouts and result["examples"] == {"train": 96, "test": 24, "classes": 2}
    for found in result["models"].values():
        assert found["accuracy"] == [1.0, 1.0] and found["lr"] in study.learning_rates and found["parameters"] > 1000
    assert result["baselines"]["3 nearest neighbours"] == result["baselines"]["linear model"] == 1.0
    assert "no difference shown" in result["verdict"] and len(lines) == 2 * 2 + 2 * 2


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (RIGHT, WRONG, "a has 100.00% more right than b: a is better"),
        (WRONG, RIGHT, "a has 100.00% fewer right than b: b is better"),
        (RIGHT, RIGHT, "no difference shown"),
        (torch.arange(800).reshape(2, 400) % 20 > 0, torch.arange(800).reshape(2, 400) % 20 > 1, "a is better"),
        (torch.arange(40).reshape(1, 40) % 20 > 0, torch.arange(40).reshape(1, 40) % 20 > 1, "no difference shown"),
    ],
)
def test_the_verdict_says_no_more_than_the_examples_do(first: torch.Tensor, second: torch.Tensor, words: str) -> None:
    assert words in verdict({"a": first, "b": second})


def test_the_default_vit_has_about_twice_the_parameters() -> None:
    data = Labelled(torch.randn(20, 8, 8), torch.arange(20) % 10)
    study = ImageStudy()
    ours, vit = (images.build(study, layout, data).n_parameters() for layout in default_layouts(study, data))
    assert vit / ours == pytest.approx(2, rel=0.15)


def test_baselines_are_what_they_say() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    x = torch.randn(200, 4, 4) + 3 * (2 * labels[:, None, None] - 1)
    found = baselines(Labelled(x[:150], labels[:150]), Labelled(x[150:], labels[150:]))
    assert found == {"most frequent class": 0.5, "3 nearest neighbours": 1.0, "linear model": 1.0}


def test_series_are_classified_too() -> None:
    data = Labelled(torch.randn(20, 12, 1), torch.arange(20) % 10)
    model = images.build(ImageStudy("mnist1d"), "encoder_attention", data)
    assert model(data.inputs).shape == (20, 10)


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["--data", str(tmp_path)]) == 2
    assert "one pair of idx files" in capsys.readouterr().err
    bars(tmp_path)
    command = ["--data", str(tmp_path), "--patch", "3", "--layouts", "encoder_attention", "--d-model", "32"]
    assert images.main(command) == 2 and "multiple of patch=3" in capsys.readouterr().err
    command[3] = "2"
    assert images.main([*command, "--epochs", "1", "--seeds", "1", "--folder", str(tmp_path / "out")]) == 0
    assert "3 nearest neighbours" in capsys.readouterr().out
    with pytest.raises(UsageError, match="epochs must be at least 1"):
        ImageStudy(epochs=0)


@pytest.mark.slow
def test_a_monarch_mixer_reads_digits_as_well_as_a_vit_of_twice_its_size(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="an extra: pip install 'bestiary[samples]'")
    found = run(ImageStudy(folder=str(tmp_path)), lambda line: print(line, file=sys.stderr))
    ours, vit = found["models"].values()
    assert np.mean(ours["accuracy"]) > 0.97 and np.mean(ours["accuracy"]) > np.mean(vit["accuracy"]) - 0.01
