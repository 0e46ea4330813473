from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.data import text
from bestiary.errors import UsageError


def test_a_folder_is_read_recursively_in_order_and_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.TXT", "image.png", ".hidden/d.txt", "a/.e.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert [document.text for document in text.read(tmp_path)] == ["a/b/c.TXT", "a/z.md", "b.txt"]


def test_several_paths_keep_their_order_and_no_file_is_read_twice(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    found = text.read([tmp_path / "c.txt", str(tmp_path)])
    assert [document.text for document in found] == ["c", "a", "b"]


def test_line_ends_become_newlines_and_the_byte_order_mark_goes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert text.read(tmp_path / "a.txt")[0].text == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("content", "byte", "offset", "replaced"),
    [
        (b"good\xffbad", "0xff", 4, "good\N{REPLACEMENT CHARACTER}bad"),
        (b"cut off \xe2\x82", "0xe2", 8, "cut off \N{REPLACEMENT CHARACTER}"),
        (b"a\0b\xff", "0x00", 1, "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"),
        (b"\xc3\xa9\x80\0", "0x80", 2, "\u00e9\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"),
        ("wide".encode("utf-16-le"), "0x00", 1, None),
    ],
)
def test_a_bad_byte_is_named_or_replaced(
    tmp_path: Path, content: bytes, byte: str, offset: int, replaced: str | None
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.txt: byte {byte} at offset {offset} is not UTF-8"):
        text.read(path)
    if replaced is not None:
        (document,) = text.read(path, errors="replace")
        assert (document.text, document.replaced) == (replaced, replaced.count("\N{REPLACEMENT CHARACTER}"))


def test_a_replacement_character_in_the_file_itself_is_no_bad_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\N{REPLACEMENT CHARACTER}".encode())
    assert text.read(tmp_path)[0].replaced == 0


@given(st.binary(max_size=20))
def test_the_first_bad_byte_is_where_good_text_ends(content: bytes) -> None:
    offset = text.first_bad_byte(content)
    good = content if offset < 0 else content[:offset]
    assert b"\0" not in good
    good.decode()  # raises if it were not good
    if offset >= 0:
        end = content[offset : offset + 1]
        assert end == b"\0" or _is_bad(content[offset : offset + 4].partition(b"\0")[0])


def _is_bad(content: bytes) -> bool:
    """Whether no valid character begins here."""
    return not any(_decodes(content[:n]) for n in range(1, 5) if n <= len(content))


def _decodes(content: bytes) -> bool:
    try:
        return len(content.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_nothing_to_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    for paths, message in [
        ([], "no text to read"),
        (tmp_path / "missing.txt", "no such file or folder: .*missing.txt"),
        (tmp_path / "empty", r"no \*.txt or \*.md file in the folder"),
        (tmp_path / "nothing.txt", "no text in .*nothing.txt"),
    ]:
        with pytest.raises(UsageError, match=message):
            text.read(paths)
    with pytest.raises(UsageError, match=r"unknown errors 'ignore'.*replace, strict"):
        text.read(tmp_path, errors="ignore")
