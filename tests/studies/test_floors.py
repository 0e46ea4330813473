import itertools
import math
from collections import Counter, defaultdict

from bestiary.studies.floors import ngram_bits_per_byte, xz_bits_per_byte


def by_definition(train: bytes, text: bytes, order: int) -> float:
    """Witten-Bell interpolation with dictionaries, byte by byte."""
    grams = Counter(train[i : i + n] for n in range(1, order + 1) for i in range(len(train) - n + 1))
    followers = defaultdict(set)
    totals = Counter()
    for gram, count in grams.items():
        followers[gram[:-1]].add(gram[-1])
        totals[gram[:-1]] += count
    bits = 0.0
    for i, byte in enumerate(text):
        p = 1 / 256
        for n in range(1, min(order, i + 1) + 1):
            context = text[i - n + 1 : i]
            kinds = len(followers[context])
            if totals[context]:
                p = (grams[context + bytes([byte])] + kinds * p) / (totals[context] + kinds)
        bits -= math.log2(p)
    return bits / len(text)


def test_the_ngram_floor_is_witten_bell_interpolation() -> None:
    train, text = b"abracadabra, said the abracadaver" * 3, b"abrakadabra \xff"
    for order in (1, 2, 3, 6, 8):
        assert math.isclose(
            ngram_bits_per_byte(train, text, order=order), by_definition(train, text, order), rel_tol=1e-12
        )


def test_ngram_probabilities_sum_to_one() -> None:
    train, context = b"the cat sat on the mat", b"the "
    total = 0.0
    for byte in range(256):
        with_it = ngram_bits_per_byte(train, context + bytes([byte])) * (len(context) + 1)
        total += 2 ** -(with_it - ngram_bits_per_byte(train, context) * len(context))
    assert math.isclose(total, 1, rel_tol=1e-9)


def test_without_training_text_nothing_is_known() -> None:
    assert ngram_bits_per_byte(b"", b"abc") == 8


def test_xz_knows_what_it_has_seen() -> None:
    train = bytes(itertools.islice((i * i * 7919 // 13 % 251 for i in itertools.count()), 20_000))
    assert xz_bits_per_byte(train, train[5000:9000]) < 0.5 < xz_bits_per_byte(b"", train[5000:9000])
