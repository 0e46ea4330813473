import os
from pathlib import Path

import pytest

from bestiary.data.files import cache_folder, whole_folder, write_whole
from bestiary.errors import BestiaryError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "new \ud800")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_file_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BestiaryError, match=r"cannot write .*inside: "):
        write_whole(tmp_path / "file" / "inside", "text")
    with pytest.raises(BestiaryError, match=r"cannot write .*inside: "), whole_folder(tmp_path / "file" / "inside"):
        pass


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with whole_folder(folder) as part:
            (part / content).touch()
        assert os.listdir(folder) == [content]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with whole_folder(folder) as part:
        (part / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as part:
        (part / "new").touch()
        raise KeyboardInterrupt
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_the_cache_lies_where_the_user_or_the_platform_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BESTIARY_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "bestiary"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "bestiary"
