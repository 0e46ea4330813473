"""Ids that encoders need beside a text's own: for what is masked, for the start of a row, and between two texts."""

from dataclasses import dataclass

from bestiary.data.tokenizer import JsonTokenizer, Tokenizer

NAMES = {"mask": ("[MASK]", "<mask>"), "first": ("[CLS]", "<s>"), "separator": ("[SEP]", "</s>")}


@dataclass(frozen=True)
class SpecialIds:
    """Special ids, and the vocabulary of a model that knows them.

    Args:
        mask: stands where a token is hidden.
        first: begins a row that is classified.
        separator: ends each text of a row.
        plain: size of the tokenizer's own vocabulary.
        vocab_size: size of the model's.
    """

    mask: int
    first: int
    separator: int
    plain: int
    vocab_size: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The tokenizer's own special ids where it has BERT's or RoBERTa's, or else the next ids after its vocabulary."""
    found: dict[str, int] = {}
    size = tokenizer.vocab_size
    for use, names in NAMES.items():
        known = [tokenizer.core.token_to_id(name) for name in names] if isinstance(tokenizer, JsonTokenizer) else []
        found[use] = next((token for token in known if token is not None), size)
        size += found[use] == size
    return SpecialIds(**found, plain=tokenizer.vocab_size, vocab_size=size)
