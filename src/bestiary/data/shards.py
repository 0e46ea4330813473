"""Token ids on disk, memory-mapped: training reads windows of a corpus of any size without loading it.

A folder holds `index.json` and files of uint16 or uint32 ids, one document after another, each followed by the
tokenizer's end of text where it has one. The index says what was tokenised by what, so that building again is skipped
where nothing changed, and how large each file must be, which is checked before any of it is used.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bestiary.data.files import cache_folder, whole_folder, write_whole
from bestiary.data.tokenizer import Tokenizer
from bestiary.errors import BestiaryError, UsageError

SCHEMA = 1
INDEX = "index.json"
SHARD_TOKENS = 1 << 28
FILES = r"index\.json|\d{5,}\.bin"  # all that a folder of shards may hold
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Index:
    """What `index.json` says.

    Args:
        tokenizer: fingerprint of the tokenizer.
        source: checksum of the documents, see `checksum`.
        text_bytes: bytes of the documents' UTF-8, without ends of text: the denominator of bits per byte.
        dtype: of the ids, "uint16" or "uint32", little-endian.
        files: name and number of ids of each file.
        document_ends: after how many ids each document (with its end of text) ends.
    """

    tokenizer: str
    source: str
    text_bytes: int
    dtype: str
    files: list[tuple[str, int]]
    document_ends: list[int]
    schema: int = SCHEMA

    @property
    def tokens(self) -> int:
        return sum(size for _, size in self.files)


class Shards:
    """The ids in a folder as one long sequence: `len(shards)`, and `shards[start:stop]` as an int64 array.

    Raises:
        UsageError: there is no index in the folder.
        BestiaryError: the index is damaged, or a file is not as large as it says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        for name, size in self.index.files:
            path = self.folder / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size * dtype.itemsize:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise BestiaryError(
                    f"{path} {found}, its index says {size * dtype.itemsize}; delete {self.folder} and build it again"
                )
        self._files = [np.memmap(self.folder / name, dtype, "r", shape=(size,)) for name, size in self.index.files]
        self._ends = np.cumsum([size for _, size in self.index.files])

    def __len__(self) -> int:
        return self.index.tokens

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, stride = window.indices(len(self))
        if stride != 1:
            raise UsageError(f"shards are read in steps of 1, not {stride}")
        parts = []
        while start < stop:
            file = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[file]) - len(self._files[file])
            end = min(stop, int(self._ends[file]))
            parts.append(self._files[file][start - first : end - first].astype(np.int64))
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, its end of text included."""
        return self[self.index.document_ends[i - 1] if i else 0 : self.index.document_ends[i]]


def build(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    folder: str | Path | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """Tokenise documents into a folder, atomically; where the folder has them already, only open it.

    Args:
        folder: where; None for a place in the cache, named by the checksums of text and tokenizer.
        shard_tokens: most ids of one file.

    Raises:
        UsageError: there is no document, all are empty, or the folder holds other things than shards.
        BestiaryError: the folder cannot be written.
    """
    documents = [text for text in documents if text]
    if not documents:
        raise UsageError("there is no text to tokenise")
    source = checksum(documents)
    folder = cache_folder() / "tokens" / f"{source[:16]}-{tokenizer.fingerprint}" if folder is None else Path(folder)
    known = _existing(folder)
    if known is not None and (known.index.source, known.index.tokenizer) == (source, tokenizer.fingerprint):
        return known
    dtype = DTYPES[tokenizer.vocab_size > 1 << 16]
    with whole_folder(folder) as part:
        files: list[tuple[str, int]] = []
        ends: list[int] = []
        for ids in _tokenise(documents, tokenizer, ends):
            _append(part, files, ids.astype(np.dtype(dtype).newbyteorder("<")), shard_tokens)
        text_bytes = sum(len(text.encode()) for text in documents)
        index = Index(tokenizer.fingerprint, source, text_bytes, dtype, files, ends)
        write_whole(part / INDEX, json.dumps(asdict(index)))
    return Shards(folder)


def _existing(folder: Path) -> Shards | None:
    """The shards in a folder, None if they are damaged or of another version; refuses to replace what are no shards."""
    if not folder.exists():
        return None
    if not folder.is_dir() or any(not re.fullmatch(FILES, file.name) for file in folder.iterdir()):
        raise UsageError(f"{folder} holds other things than token shards: give a new or an empty folder")
    try:
        return Shards(folder)
    except BestiaryError:
        return None


def checksum(documents: Iterable[str]) -> str:
    """sha256 of the documents and of where each one ends."""
    digest = hashlib.sha256()
    for text in documents:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _tokenise(documents: Sequence[str], tokenizer: Tokenizer, ends: list[int]) -> Iterator[np.ndarray]:
    """The ids of each document and its end of text; notes in `ends` where each one ends."""
    total = 0
    for text in documents:
        ids = tokenizer.encode(text)
        if tokenizer.eos_id is not None:
            ids = np.append(ids, tokenizer.eos_id)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise BestiaryError(f"the tokenizer gave the id {ids.max()}, its vocabulary has {tokenizer.vocab_size}")
        total += len(ids)
        ends.append(total)
        yield ids


def _append(folder: Path, files: list[tuple[str, int]], ids: np.ndarray, shard_tokens: int) -> None:
    """Write ids behind those that are there, beginning a new file where the last one is full."""
    while len(ids):
        if not files or files[-1][1] == shard_tokens:
            files.append((f"{len(files):05}.bin", 0))
        name, size = files[-1]
        fitting, ids = ids[: shard_tokens - size], ids[shard_tokens - size :]
        with open(folder / name, "ab") as file:
            file.write(fitting.tobytes())
        files[-1] = (name, size + len(fitting))


def _read_index(folder: Path) -> Index:
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no token shards in {folder}: cannot read {INDEX} ({error.strerror})") from error
    except ValueError as error:
        raise BestiaryError(f"{path} is damaged: {error}; delete {folder} and build it again") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise BestiaryError(f"{path} is of another version; delete {folder} and build it again")
    try:
        fields["files"] = [(name, size) for name, size in fields["files"]]
        index = Index(**fields)
        consistent = index.dtype in DTYPES and index.document_ends[-1] == index.tokens
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise BestiaryError(f"{path} is damaged: {error}; delete {folder} and build it again") from error
    if not consistent:
        raise BestiaryError(f"{path} is damaged: its counts disagree; delete {folder} and build it again")
    return index
