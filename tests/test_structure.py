"""Rooms of the package import downwards only: no set of them, and no set of files, reaches itself."""

from pathlib import Path

import mtpress
from structure import circles, file_arrows, room_arrows

SOURCE = Path(mtpress.__file__).resolve().parent


def test_no_rooms_import_one_another() -> None:
    assert circles(room_arrows(SOURCE)) == []


def test_no_files_import_one_another() -> None:
    assert circles(file_arrows(SOURCE)) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]
