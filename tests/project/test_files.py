"""Files and folders are written whole or not at all."""

from pathlib import Path

import pytest

from moeyard.files import new_folder, replaced


class FailureError(Exception):
    """What goes wrong in these tests."""


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FailureError), replaced(path) as unfinished:
        unfinished.write_text("ne")
        raise FailureError
    assert path.read_text() == "old"
    with replaced(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(FailureError), new_folder(target) as unfinished:
        (unfinished / "part").write_text("1")
        raise FailureError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "left by a killed attempt").touch()
    with new_folder(target) as unfinished:
        (unfinished / "part").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["part"]
    assert list(tmp_path.iterdir()) == [target]
