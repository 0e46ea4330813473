"""From text to token ids and back: bytes, a BPE trained on one's own text, or any `tokenizer.json`.

One small protocol serves all of them. `token_bytes` says how many bytes of UTF-8 each id stands for, which turns a loss
in nats per token into bits per byte; `detokenizer` turns a stream of ids into text that can be printed as it comes.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bestiary.data.detokenizer import ByBytes, ByText, Detokenizer
from bestiary.data.files import write_whole
from bestiary.errors import BestiaryError, UsageError

END_OF_TEXT = "<|endoftext|>"
EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BYTES_FILE, JSON_FILE, CONFIG_FILE = "byte_tokenizer.json", "tokenizer.json", "tokenizer_config.json"
LINE_START = re.compile(r"(?<=\S\n)(?=\S)")
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

    def detokenizer(self) -> Detokenizer:
        """A fresh decoder of a stream of ids."""

    def save(self, folder: str | Path) -> None:
        """Write what `load` needs into a folder."""


class ByteTokenizer:
    """The 256 bytes of UTF-8. NUL (id 0), which no text contains, ends a document.

    So the vocabulary stays a power of two and a model can still learn where texts end. `decode(encode(text)) == text`
    for every text without NUL.
    """

    vocab_size = 256
    eos_id = 0
    fingerprint = hashlib.sha256(b"bestiary byte tokenizer, NUL ends a document").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`; raises UsageError for a text that UTF-8 cannot hold (lone surrogates)."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        return b"".join(self.bytes_of(int(id)) for id in ids).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The byte of an id, none for the end of text."""
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"token id {token} is not a byte: allowed are 0 to 255")
        return bytes([token]) if token != self.eos_id else b""

    def token_bytes(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[self.eos_id] = 0
        return lengths

    def detokenizer(self) -> Detokenizer:
        return ByBytes(self.bytes_of)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_whole(folder / BYTES_FILE, json.dumps({"tokenizer": "bytes", "fingerprint": self.fingerprint}))
        (folder / JSON_FILE).unlink(missing_ok=True)


class JsonTokenizer:
    """Any tokenizer in the `tokenizer.json` format of Hugging Face.

    Special tokens written in a text stay plain text, unless `encode` is asked to read them.

    Args:
        core: the tokenizer as the `tokenizers` library has it.
        eos: the token that ends a document; None to look for the usual names.
    """

    def __init__(self, core: tokenizers.Tokenizer, *, eos: str | None = None):
        self.core = core
        self.core.no_padding()
        self.core.no_truncation()
        ids = [core.token_to_id(name) for name in (EOS_NAMES if eos is None else (eos,))]
        found = [id for id in ids if id is not None]
        if eos is not None and not found:
            raise UsageError(f"the tokenizer has no token {eos!r} to end a document with")
        self.eos_id: int | None = found[0] if found else None
        self.vocab_size: int = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._specials = {id for id, token in core.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def fingerprint(self) -> str:
        description = json.dumps(self._description, sort_keys=True) + f" eos {self.eos_id}"
        return hashlib.sha256(description.encode()).hexdigest()[:16]

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """See `Tokenizer.encode`; `special`: read special tokens in the text, as chat templates write them."""
        self.core.encode_special_tokens = not special
        _utf8(text)
        pieces = _pieces(text, PIECE) if self._may_cut and not special else [text]
        ids = [np.asarray(self.core.encode(piece, add_special_tokens=False).ids, np.int64) for piece in pieces]
        return np.concatenate(ids)

    def decode(self, ids: Ids) -> str:
        return self.core.decode([int(id) for id in ids], skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that an id stands for, as far as its spelling in the vocabulary tells."""
        spelling = self.core.id_to_token(token)
        if spelling is None or token in self._specials:
            return b""
        if self._byte_level:
            known = all(letter in BYTE_OF for letter in spelling)  # else an added token, spelled as text
            return bytes(BYTE_OF[letter] for letter in spelling) if known else spelling.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", spelling):
            return bytes([int(spelling[3:5], 16)])
        return spelling.removeprefix("##").replace("\u2581", " ").encode()

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`; exact for byte-level tokenizers, for others but for what they normalise away."""
        return np.array([len(self.bytes_of(token)) for token in range(self.vocab_size)], np.int64)

    def detokenizer(self) -> Detokenizer:
        return ByBytes(self.bytes_of) if self._byte_level else ByText(self.decode)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, and the name of the end of text to `tokenizer_config.json`, as transformers does."""
        folder = Path(folder)
        eos = None if self.eos_id is None else self.core.id_to_token(self.eos_id)
        write_whole(folder / CONFIG_FILE, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}))
        write_whole(folder / JSON_FILE, self.core.to_str())
        (folder / BYTES_FILE).unlink(missing_ok=True)

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self.core.to_str())

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether each id spells bytes, and a text is these bytes joined."""
        return (self._description["decoder"] or {}).get("type") == "ByteLevel"

    @functools.cached_property
    def _may_cut(self) -> bool:
        """Whether no token crosses the start of a line: GPT-2's splitting, and nothing added at the start of a text."""
        step = self._description["pre_tokenizer"] or {}
        gpt2 = step.get("type") == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]
        added = self.core.get_added_tokens_decoder().values()
        return gpt2 and self._description["normalizer"] is None and not any("\n" in token.content for token in added)


def train_bpe(texts: str | Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE: id 0 ends a document, then the 256 bytes, then merges, at most `vocab_size` ids in all.

    Splits text into words as GPT-2 does. Deterministic; a short text may yield fewer ids.
    """
    if vocab_size < 257:
        raise UsageError(f"vocab_size must be at least 257 (the bytes and the end of text), not {vocab_size}")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [texts] if isinstance(texts, str) else texts
    core.train_from_iterator((piece for text in texts for piece in _pieces(text, PIECE)), trainer)
    return JsonTokenizer(core, eos=END_OF_TEXT)


def load(source: str | Path) -> Tokenizer:
    """The tokenizer that `source` names: "bytes", a folder that one was saved into, or a `tokenizer.json`.

    Raises:
        UsageError: there is none at that place.
        BestiaryError: the file is damaged.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    file = path / JSON_FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        if (path / BYTES_FILE).exists():
            return ByteTokenizer()
        raise UsageError(f"no tokenizer in {path}: it has neither {JSON_FILE} nor {BYTES_FILE}")
    if not file.exists():
        raise UsageError(f'no tokenizer {str(source)!r}: give "bytes", a folder with a {JSON_FILE}, or such a file')
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BestiaryError(f"{file} is not a readable tokenizer: {error}") from error
    return JsonTokenizer(core, eos=_configured_eos(file.with_name(CONFIG_FILE), core))


def _configured_eos(config: Path, core: tokenizers.Tokenizer) -> str | None:
    """The end of text that a `tokenizer_config.json` names, if it does and the tokenizer has it."""
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    eos = eos.get("content") if isinstance(eos, dict) else eos  # older files describe the token at length
    return eos if isinstance(eos, str) and core.token_to_id(eos) is not None else None


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text where a line follows another directly: around blank lines GPT-2's splitting looks across the cut."""
    start = 0
    while cut := LINE_START.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text has a lone surrogate at character {error.start}: it is not Unicode text") from error


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as it is, the others by the letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
