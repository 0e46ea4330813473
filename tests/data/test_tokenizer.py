import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from bestiary.data import tokenizer as tokenizer_module
from bestiary.data.tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, Tokenizer, load, train_bpe
from bestiary.errors import BestiaryError, UsageError

PROSE = """The quick brown fox jumps over the lazy dog.

  Indented, then a line
and another: 1234567; caf\u00e9 \u20ac \U0001f98a
"""
TEXT = PROSE * 8
BPE = train_bpe(TEXT, 320)
WITHOUT_NUL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def metaspace() -> JsonTokenizer:
    """A tokenizer as SentencePiece makes them: spaces as U+2581, unknown characters as bytes."""
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>", *fallback], show_progress=False)
    core.train_from_iterator(["the cat sat on the mat and the cat ate"], trainer)
    description = json.loads(core.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if not t["content"].startswith("<0x")]
    return JsonTokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))


ALL = {"bytes": ByteTokenizer(), "bpe": BPE, "metaspace": metaspace()}
EXACT = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
EVERY = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL.keys())


@EXACT
@given(text=WITHOUT_NUL)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int64
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


@EXACT
@given(text=WITHOUT_NUL)
def test_bytes_of_the_tokens_add_up_to_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


@EXACT
@given(data=st.data())
def test_a_stream_of_any_ids_gives_what_decoding_all_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids)


@EVERY
def test_a_stream_of_a_text_gives_the_text_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    text = "the caf\u00e9 \u20ac sat \U0001f98a on"
    stream = tokenizer.detokenizer()
    parts = [stream.add(int(token)) for token in tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_a_stream_of_broken_bytes_does_not_wait_forever() -> None:
    tokenizer = ALL["metaspace"]
    stream = tokenizer.detokenizer()
    broken = tokenizer.core.token_to_id("<0xFF>")
    assert "\N{REPLACEMENT CHARACTER}" in "".join(stream.add(broken) for _ in range(20))


@EVERY
def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_bpe("another", 257).save(tmp_path)  # one that was there before
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert again.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


def test_fingerprints_tell_tokenizers_apart() -> None:
    prints = [
        tokenizer.fingerprint for tokenizer in (*ALL.values(), train_bpe(TEXT, 319), JsonTokenizer(BPE.core, eos="a"))
    ]
    assert len(set(prints)) == len(prints)


def test_training_is_deterministic_and_as_large_as_asked() -> None:
    assert train_bpe(TEXT, 320).fingerprint == BPE.fingerprint
    assert BPE.vocab_size == 320
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 2
    assert train_bpe("ab", 300).vocab_size < 300  # no more pairs to merge
    with pytest.raises(UsageError, match="at least 257"):
        train_bpe(TEXT, 256)


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(["a", "the", " ", "  ", "\n", "'s", "\t", ".", "12", "\u00e9", "\r", "\x1c"])).map("".join)
)
def test_encoding_in_pieces_changes_nothing(text: str) -> None:
    whole = BPE.core.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE", 1)
        assert BPE.encode(text).tolist() == whole


def test_long_text_is_in_fact_encoded_in_pieces() -> None:
    assert len(list(tokenizer_module._pieces(TEXT, 10))) == 16  # two places a copy
    assert BPE._may_cut and not metaspace()._may_cut


def test_special_tokens_in_a_text_are_text_unless_asked() -> None:
    text = f"a{END_OF_TEXT}b"
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.eos_id not in BPE.encode(text)
    assert BPE.encode(text, special=True)[1] == BPE.eos_id
    assert BPE.decode([BPE.eos_id]) == ""


def test_nul_ends_a_document_of_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([104, 105, 0]) == "hi"
    assert tokenizer.token_bytes()[0] == 0
    assert (tokenizer.token_bytes()[1:] == 1).all()


def test_the_configured_end_of_text_is_found(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    for spelling in ("fox", {"content": "fox", "special": True}):
        core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        core.add_tokens(["fox"])
        core.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": spelling}))
        assert load(tmp_path).eos_id == core.token_to_id("fox")
    assert load("bytes").eos_id == 0


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer in"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer 'byte'"):
        load("byte")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(BestiaryError, match=r"tokenizer\.json is not a readable tokenizer"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no token 'nope'"):
        JsonTokenizer(BPE.core, eos="nope")
    with pytest.raises(UsageError, match="256 is not a byte"):
        ByteTokenizer().decode([256])


@EVERY
def test_a_lone_surrogate_is_one_clear_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
