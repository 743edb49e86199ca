# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names and texts of others: how they are shown, and which file is meant by what was shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _names, _text
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

LATIN1 = os.fsdecode(b"M\xfcller.tar")


def test_what_does_something_else_than_print_is_escaped() -> None:
    assert _text.shown("\x1b[2J\x9b31m\u202egnp\ud800\x7f") == "%1B[2J%C2%9B31m%E2%80%AEgnp%ED%A0%80%7F"
    assert _text.shown("two\n\tlines, \u2026 and \xa0") == "two\n\tlines, \u2026 and \xa0"
    assert _text.printable("two\nlines\r\n\x1b") == "two lines %1B"
    assert _text.printable("x" * 5000) == "x" * 2000 + " ... (3000 more characters)"


def test_bytes_that_are_not_utf8_are_escaped() -> None:
    assert _text.shown(LATIN1) == "M%FCller.tar"
    assert _text.shown("Müller 100%.tar") == "Müller 100%.tar"
    result = {"archives": [{"path": LATIN1, "size": 5, "vm": None}], LATIN1: (LATIN1, True)}
    assert _text.all_shown(result) == {
        "archives": [{"path": "M%FCller.tar", "size": 5, "vm": None}],
        "M%FCller.tar": ["M%FCller.tar", True],
    }


@pytest.fixture
def nas(tmp_path: Path) -> Path:
    """A directory with such a name."""
    directory = tmp_path / os.fsdecode(b"100%FF\xe9")
    directory.mkdir()
    return directory


def test_what_was_shown_can_be_handed_back(nas: Path) -> None:
    archive = nas / LATIN1
    archive.touch()
    assert _names.meant(_text.shown(str(archive))) == str(archive)
    assert _names.meant(str(archive)) == str(archive)


def test_a_name_with_control_characters_can_be_handed_back(nas: Path) -> None:
    archive = nas / "a\x1b[2J\x9b.tar"
    archive.touch()
    assert _text.shown(archive.name) == "a%1B[2J%C2%9B.tar"
    assert _names.meant(_text.shown(str(archive))) == str(archive)


@pytest.mark.parametrize("name", ["new%FC.tar", "M%C3%BCller.tar", "plain.tar", "%fc"])
def test_a_name_with_a_percent_sign_is_itself(nas: Path, name: str) -> None:
    """What is not there, what is there with percent signs, and what never comes out of `shown`."""
    (nas / "Müller.tar").touch()
    for _there in (False, True):
        assert _names.meant(str(nas / name)) == str(nas / name)
        (nas / name).touch()


def test_a_name_that_two_files_are_shown_by_is_refused(nas: Path) -> None:
    (nas / LATIN1).touch()
    (nas / "M%FCller.tar").touch()
    with pytest.raises(RefusedError, match=r"2 files are shown as M%FCller\.tar"):
        _names.meant(str(nas / "M%FCller.tar"))
