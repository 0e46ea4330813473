import json
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import shards
from bestiary.data.shards import Shards, build, checksum
from bestiary.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from bestiary.errors import BestiaryError, UsageError

DOCUMENTS = ["To be, or not to be", "", "that is the question:", "caf\u00e9"]
TOKENS = np.frombuffer("To be, or not to be\0that is the question:\0caf\u00e9\0".encode(), np.uint8)


@pytest.mark.parametrize("shard_tokens", [1, 7, 20, 1000])
def test_any_window_of_the_shards_is_that_of_the_tokens(tmp_path: Path, shard_tokens: int) -> None:
    found = build(DOCUMENTS, ByteTokenizer(), tmp_path / "tokens", shard_tokens=shard_tokens)
    assert len(found) == len(TOKENS)
    assert len(found.index.files) == -(-len(TOKENS) // shard_tokens)
    for start in range(len(TOKENS) + 2):
        for stop in range(start, len(TOKENS) + 2):
            np.testing.assert_array_equal(found[start:stop], TOKENS[start:stop])
    assert found[3:9].dtype == np.int64


def test_documents_are_found_by_number_and_bytes_are_counted(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    found = build(DOCUMENTS, tokenizer, tmp_path / "tokens", shard_tokens=7)
    texts = [text for text in DOCUMENTS if text]
    assert [tokenizer.decode(found.document(i)) for i in range(3)] == texts
    assert found.index.text_bytes == sum(len(text.encode()) for text in texts)


def test_ids_of_a_large_vocabulary_are_stored_in_four_bytes(tmp_path: Path) -> None:
    tokenizer = train_bpe("abc", 257)
    tokenizer.core.add_tokens([f"word{i}" for i in range(70_000)])
    large = JsonTokenizer(tokenizer.core)
    found = build(["word69999 abc"], large, tmp_path / "tokens")
    assert found.index.dtype == "uint32"
    assert found[: len(found)].tolist() == [*large.encode("word69999 abc"), large.eos_id]
    assert found[:1][0] > 1 << 16
    assert build(["abc"], ByteTokenizer(), tmp_path / "small").index.dtype == "uint16"


def test_building_again_is_skipped_where_nothing_changed(tmp_path: Path) -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text: str) -> np.ndarray:
            Counting.calls += 1
            return super().encode(text)

    def calls(documents: list[str]) -> int:
        before = Counting.calls
        found = build(documents, Counting(), tmp_path / "tokens")
        assert found.index.source == checksum(text for text in documents if text)
        return Counting.calls - before

    assert calls(DOCUMENTS) == 3
    assert calls(DOCUMENTS) == 0
    assert calls([*DOCUMENTS, "more"]) == 4
    assert calls(["To be, or not to bethat", " is the question:", "caf\u00e9", "more"]) == 4  # other bounds
    found = build(DOCUMENTS, train_bpe(DOCUMENTS, 300), tmp_path / "tokens")
    assert found.index.tokenizer == train_bpe(DOCUMENTS, 300).fingerprint


def test_a_file_of_another_size_is_refused_and_built_anew(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    build(DOCUMENTS, ByteTokenizer(), folder)
    with open(folder / "00000.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(BestiaryError, match=rf"00000.bin has {2 * len(TOKENS) + 1} bytes, its index says"):
        Shards(folder)
    assert len(build(DOCUMENTS, ByteTokenizer(), folder)) == len(TOKENS)
    (folder / "00000.bin").unlink()
    with pytest.raises(BestiaryError, match=r"00000.bin is missing"):
        Shards(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 0},
        {"dtype": "float32"},
        {"document_ends": [1, 2]},
        {"document_ends": []},
        {"files": [["00000.bin"]]},
        {"files": [["../secret", len(TOKENS)]]},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_index_is_refused_and_built_anew(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "tokens"
    build(DOCUMENTS, ByteTokenizer(), folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(BestiaryError, match=r"build it again"):
        Shards(folder)
    assert len(build(DOCUMENTS, ByteTokenizer(), folder)) == len(TOKENS)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            if "question" in text:
                raise KeyboardInterrupt
            return super().encode(text)

    with pytest.raises(KeyboardInterrupt):
        build(DOCUMENTS, Failing(), tmp_path / "tokens")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other things than token shards"):
        build(DOCUMENTS, ByteTokenizer(), tmp_path)
    with pytest.raises(UsageError, match="holds other things than token shards"):
        build(DOCUMENTS, ByteTokenizer(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_tokenizer_whose_ids_leave_its_vocabulary_is_refused(tmp_path: Path) -> None:
    class Wrong(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(BestiaryError, match="gave the id 195, its vocabulary has 100"):
        build(["caf\u00e9"], Wrong(), tmp_path / "tokens")


def test_no_text_and_no_shards_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to tokenise"):
        build(["", ""], ByteTokenizer(), tmp_path / "tokens")
    with pytest.raises(UsageError, match="no token shards in"):
        Shards(tmp_path)


def test_without_a_folder_they_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))
    first, second = build(DOCUMENTS, ByteTokenizer()), build(["other"], ByteTokenizer())
    assert {first.folder.parent, second.folder.parent} == {tmp_path / "tokens"}
    assert first.folder != second.folder
    assert shards.INDEX in {file.name for file in first.folder.iterdir()}
