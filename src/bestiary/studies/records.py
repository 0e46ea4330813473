"""The result file of a study: JSON lines that only grow, so that whatever was finished survives a kill."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """`results.jsonl` in a study's folder: appended line by line, read back on start.

    A last line that a kill tore is cut off. Records are found by the values of some of their keys.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.all: list[Record] = []
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                os.truncate(self.path, len(whole))
            self.all = [json.loads(line) for line in whole.splitlines() if line.strip()]

    def add(self, **record: Any) -> Record:
        """Append a record; it is on the disk when this returns."""
        line = json.dumps(record, allow_nan=True) + "\n"
        with open(self.path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.all.append(record)
        return record

    def find(self, **wanted: Any) -> list[Record]:
        """All records that have these values, in order."""
        return [record for record in self.all if all(record.get(key) == value for key, value in wanted.items())]

    def has(self, **wanted: Any) -> bool:
        return bool(self.find(**wanted))
