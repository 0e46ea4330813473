"""The worked example of docs/adding-a-mixer.md runs as printed, and its mixer passes every law."""

import importlib
import re
import sys
from pathlib import Path

import bestiary
from bestiary.conformance import check

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-mixer.md"


def test_the_worked_example_passes_every_law(tmp_path, monkeypatch) -> None:
    mixer, use = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (tmp_path / "gated_average.py").write_text(mixer, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registered = dict(bestiary.mixers.registry._classes)
    try:
        example = importlib.import_module("gated_average")
        verdicts = check("gated_average", lambda: example.GatedAverage(32))
        assert [(v.law, v.message) for v in verdicts if not v.holds] == []
        names = {"torch": example.torch}
        exec(use, names)
        assert names["logits"].shape == (2, 10, 256)
    finally:  # other tests list the registered mixers
        bestiary.mixers.registry._classes = registered
        sys.modules.pop("gated_average", None)
