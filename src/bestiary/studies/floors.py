"""What a language model must beat: an n-gram model and a general-purpose compressor, on the same training bytes."""

import lzma

import numpy as np

UNSEEN = 1 / 256  # before anything is known, all bytes are equally likely


def ngram_bits_per_byte(train: bytes, text: bytes, *, order: int = 6) -> float:
    """Bits per byte of `text` under byte n-grams of `train`, interpolated as Witten and Bell (1991) do.

    p_n(c | h) = (count(h c) + kinds(h) p_{n-1}(c | shorter h)) / (count(h) + kinds(h))

    where h is a context and kinds(h) the number of different bytes that followed it. An n-gram (n up to 8) is a 64-bit
    number here, so that counting is sorting.

    Args:
        order: bytes in the longest n-gram, the predicted one included; 1 to 8.
    """
    known, asked = np.frombuffer(train, np.uint8), np.frombuffer(text, np.uint8)
    if not len(asked):
        return float("nan")
    probability = np.full(len(asked), UNSEEN)
    for n in range(1, min(order, 8) + 1):
        if len(known) < n:
            break
        grams, counts = np.unique(_codes(known, n), return_counts=True)
        contexts, start = np.unique(grams >> np.uint64(8), return_index=True)
        kinds = np.diff(np.append(start, len(grams)))
        totals = np.add.reduceat(counts, start)
        wanted = _codes(asked, n)  # the first n-1 bytes have no context of this length and keep the shorter one's
        seen = _look_up(grams, counts, wanted)
        total = _look_up(contexts, totals, wanted >> np.uint64(8))
        kind = _look_up(contexts, kinds, wanted >> np.uint64(8))
        lower = probability[n - 1 :]
        probability[n - 1 :] = np.where(total > 0, (seen + kind * lower) / np.maximum(total + kind, 1), lower)
    return float(-np.log2(probability).mean())


def xz_bits_per_byte(train: bytes, text: bytes) -> float:
    """Bits per byte that `text` adds to an xz archive of `train` (preset 9 extreme, a 64 MiB window)."""
    preset = 9 | lzma.PRESET_EXTREME
    alone = len(lzma.compress(train, preset=preset))
    return 8 * (len(lzma.compress(train + text, preset=preset)) - alone) / max(len(text), 1)


def _codes(data: np.ndarray, n: int) -> np.ndarray:
    """All n-grams as numbers, the oldest byte highest: (len(data) - n + 1,) uint64."""
    length = max(len(data) - n + 1, 0)
    codes = np.zeros(length, np.uint64)
    for i in range(n):
        codes = (codes << np.uint64(8)) | data[i : i + length].astype(np.uint64)
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; keys are sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
