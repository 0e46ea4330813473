"""From text files to batches of token ids: reading, tokenising, shards on disk, batches, corpora by name."""

from bestiary.data.batches import Batches, in_order
from bestiary.data.corpora import Corpus, load_corpus
from bestiary.data.detokenizer import Detokenizer
from bestiary.data.shards import Shards
from bestiary.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Detokenizer",
    "JsonTokenizer",
    "Shards",
    "Tokenizer",
    "in_order",
    "load_corpus",
    "train_bpe",
]
