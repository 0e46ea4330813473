"""Text from files: one, many, or a folder of them, as UTF-8 and nothing else.

A NUL counts as a bad byte too: text has none, and its presence gives UTF-16 and binary files away.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import UsageError, unknown

SUFFIXES = (".txt", ".md")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Document:
    """One text: `name` is the file that it came from, `replaced` counts the bad bytes that became U+FFFD."""

    name: str
    text: str
    replaced: int = 0


def read(paths: str | Path | Sequence[str | Path], *, errors: str = "strict") -> list[Document]:
    """Read files and folders into documents, one per file; of a folder all *.txt and *.md in it, recursively, sorted
    by path, hidden ones left out. No file is read twice.

    Line ends become a newline; a byte order mark is dropped; empty files are left out.

    Args:
        errors: "strict" makes a bad byte an error with its file and offset; "replace" puts U+FFFD in its place.

    Raises:
        UsageError: a missing path, no text in all of them, a bad byte, or an unknown `errors`.
    """
    if errors not in ("strict", "replace"):
        raise unknown("errors", errors, ("strict", "replace"))
    sources = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not sources:
        raise UsageError("no text to read: give a file, several files or a folder")
    documents = [read_file(file, errors=errors) for file in dict.fromkeys(_files(sources))]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UsageError(f"no text in {', '.join(map(str, sources))}: there is nothing but empty files")
    return documents


def read_file(path: Path, *, errors: str = "strict") -> Document:
    """Read one file; see `read`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    text = content.decode(errors="replace").replace("\0", REPLACEMENT)
    replaced = text.count(REPLACEMENT) - content.count(REPLACEMENT.encode())
    if replaced and errors == "strict":
        offset = first_bad_byte(content)
        raise UsageError(
            f"{path}: byte 0x{content[offset]:02x} at offset {offset} is not UTF-8 text; "
            'convert the file, or replace bad bytes with errors="replace"'
        )
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").replace("\r\n", "\n").replace("\r", "\n")
    return Document(str(path), text, replaced)


def first_bad_byte(content: bytes) -> int:
    """Offset of the first byte that is a NUL or breaks UTF-8; -1 where there is none."""
    nul = content.find(0)
    try:
        content[: nul if nul >= 0 else None].decode()
    except UnicodeDecodeError as error:
        return error.start
    return nul


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            inside = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
            if not inside:
                raise UsageError(f"no {' or '.join('*' + suffix for suffix in SUFFIXES)} file in the folder {path}")
            yield from inside
        elif path.exists():
            yield path
        else:
            raise UsageError(f"no such file or folder: {path}")
