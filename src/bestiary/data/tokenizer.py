"""From text to token ids and back: bytes, a BPE trained on one's own text, or any `tokenizer.json`.

One small protocol serves all of them. `token_bytes` says how many bytes of UTF-8 each id stands for, which turns a loss
in nats per token into bits per byte; `Detokenizer` turns a stream of ids into text that can be printed as it comes.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bestiary.data.files import write_whole
from bestiary.errors import BestiaryError, UsageError

END_OF_TEXT = "<|endoftext|>"
BYTES_FILE, JSON_FILE = "byte_tokenizer.json", "tokenizer.json"
PIECE = 1 << 18  # characters that a BPE encodes at once: bounds its memory, changes nothing

Ids = Sequence[int] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; all ids lie below it."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, if there is one."""

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids for every text: 16 hex digits."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (time,) int64; none is added at its start or end."""

    def decode(self, ids: Ids) -> str:
        """The text of ids; special ids (end of text) have none, and broken UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, (vocab_size,) int64; 0 for special ids."""

    def detokenizer(self) -> "Detokenizer":
        """A fresh decoder of a stream of ids."""

    def save(self, folder: str | Path) -> None:
        """Write what `load` needs into a folder."""


class Detokenizer(Protocol):
    """Text from a stream of ids: what all calls returned, joined, is what `decode` gives for all ids at once."""

    def add(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left at the end of the stream."""


class ByteTokenizer:
    """The 256 bytes of UTF-8. NUL (id 0), which no text contains, ends a document.

    So the vocabulary stays a power of two and a model can still learn where texts end. `decode(encode(text)) == text`
    for every text without NUL.
    """

    vocab_size = 256
    eos_id = 0
    fingerprint = hashlib.sha256(b"bestiary byte tokenizer, NUL ends a document").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The byte of an id, none for the end of text."""
        return bytes([token]) if token != self.eos_id else b""

    def token_bytes(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[self.eos_id] = 0
        return lengths

    def detokenizer(self) -> Detokenizer:
        return _ByBytes(self.bytes_of)

    def save(self, folder: str | Path) -> None:
        write_whole(Path(folder) / BYTES_FILE, json.dumps({"tokenizer": "bytes", "fingerprint": self.fingerprint}))


class JsonTokenizer:
    """Any tokenizer in the `tokenizer.json` format of Hugging Face.

    Special tokens written in a text stay plain text, unless `encode` is asked to read them.

    Args:
        core: the tokenizer as the `tokenizers` library has it.
        eos: the token that ends a document; None to look for the usual names.
    """

    EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")

    def __init__(self, core: tokenizers.Tokenizer, *, eos: str | None = None):
        self.core = core
        self.core.no_padding()
        self.core.no_truncation()
        self._specials = {id for id, token in core.get_added_tokens_decoder().items() if token.special}
        names = self.EOS_NAMES if eos is None else (eos,)
        ids = [id for id in map(core.token_to_id, names) if id is not None]
        if eos is not None and not ids:
            raise UsageError(f"the tokenizer has no token {eos!r} to end a document with")
        self.eos_id: int | None = ids[0] if ids else None
        self.vocab_size: int = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        description = json.dumps(json.loads(self.core.to_str()), sort_keys=True) + f" eos {self.eos_id}"
        return hashlib.sha256(description.encode()).hexdigest()[:16]

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """See `Tokenizer.encode`; `special`: read special tokens in the text, as chat templates write them."""
        self.core.encode_special_tokens = not special
        pieces = _pieces(text, PIECE) if self._byte_level and not special else [text]
        encodings = [self.core.encode(piece, add_special_tokens=False).ids for piece in pieces]
        return np.concatenate([np.asarray(ids, np.int64) for ids in encodings] or [np.empty(0, np.int64)])

    def decode(self, ids: Ids) -> str:
        return self.core.decode([int(id) for id in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`; exact for byte-level tokenizers, for others but for what they normalise away."""
        return np.array([len(self.bytes_of(id)) for id in range(self.vocab_size)], np.int64)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that an id stands for, as far as its spelling in the vocabulary tells."""
        spelling = self.core.id_to_token(token)
        if spelling is None or token in self._specials:
            return b""
        if self._byte_level:
            # added tokens are spelled as text, all others in the alphabet of bytes
            plain = token in self._added or any(letter not in _BYTE_OF for letter in spelling)
            return spelling.encode() if plain else bytes(_BYTE_OF[letter] for letter in spelling)
        if len(spelling) == 6 and spelling.startswith("<0x"):
            return bytes([int(spelling[3:5], 16)])
        return spelling.removeprefix("##").replace("\u2581", " ").encode()

    @functools.cached_property
    def _added(self) -> set[int]:
        return set(self.core.get_added_tokens_decoder())

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether ids spell bytes exactly and no token crosses the start of a line: no normaliser, no prefix space."""
        description = json.loads(self.core.to_str())
        decoder, before = description["decoder"] or {}, description["pre_tokenizer"] or {}
        steps = before.get("pretokenizers", [before])
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        return (
            description["normalizer"] is None
            and decoder.get("type") == "ByteLevel"
            and len(byte_level) == 1
            and not byte_level[0].get("add_prefix_space", True)
            and byte_level[0].get("use_regex", True)
        )

    def detokenizer(self) -> Detokenizer:
        return _ByBytes(self.bytes_of) if self._byte_level else _ByText(self)

    def save(self, folder: str | Path) -> None:
        description = json.loads(self.core.to_str())
        if self.eos_id is not None:  # a reader of the format ignores what it does not know
            description["eos_token"] = self.core.id_to_token(self.eos_id)
        write_whole(Path(folder) / JSON_FILE, json.dumps(description, ensure_ascii=False))
