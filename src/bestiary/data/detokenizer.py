"""From a stream of token ids to text that can be printed as it comes, never with half a character."""

import codecs
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Detokenizer(Protocol):
    """A decoder of one stream: what all calls return, joined, is what `Tokenizer.decode` gives for all ids at once.

    Exact for byte-level tokenizers. For others broken UTF-8 may differ, and what their decoder rewrites afterwards.
    """

    def add(self, token: int) -> str:
        """The text that is certain after one more id; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left at the end of the stream."""


class ByBytes:
    """For ids that spell bytes: an incomplete character waits in the decoder."""

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self.bytes_of, self.decoder = bytes_of, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self.decoder.decode(self.bytes_of(token))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


class ByText:
    """For ids whose text depends on their neighbours: decode the last ones anew, and give what has come to them."""

    PATIENCE = 8  # ids after which even a doubtful end is given

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.given: list[int] = []
        self.waiting: list[int] = []

    def add(self, token: int) -> str:
        self.waiting.append(int(token))
        text = self._new_text()
        if not text or (text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.waiting) < self.PATIENCE):
            return ""
        self.given, self.waiting = self.waiting, []
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        return self.decode(self.given + self.waiting)[len(self.decode(self.given)) :]
