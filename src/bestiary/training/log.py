"""The log of a run: log.jsonl, a JSON object a line, and TensorBoard's files where tensorboard is installed."""

import json
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


class Log:
    """Appends to a run's log; on resuming, what was logged after the resumed step is cut off first."""

    def __init__(self, folder: Path, *, after: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        kept = [line for line in read_log(folder) if line["step"] <= after]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.board = _tensorboard(folder, after)

    def add(self, step: int, **values: Any) -> None:
        """One line, flushed at once."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log; a last line that a kill tore is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _tensorboard(folder: Path, after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: pip install bestiary[tensorboard]
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
