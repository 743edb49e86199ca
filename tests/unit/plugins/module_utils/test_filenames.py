# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of files, resolved as the kernel does."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError

_LEXICAL = {"normpath", "abspath", "commonpath"}


@pytest.fixture()
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """near/link leads to far/inner, near/disk to far/link2, and that to far/data."""
    (tmp_path / "far/inner").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far/inner")
    (tmp_path / "far/data").write_text("x")
    (tmp_path / "far/link2").symlink_to("data")
    (tmp_path / "near/disk").symlink_to("link/../link2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("near/link/../data", "{0}/far/data"),
        ("{0}//near/./disk", "{0}/near/disk"),
        ("/{0}/near/disk", "{0}/near/disk"),
        ("near/link/x", "{0}/near/link/x"),
        ("near/", "{0}/near"),
    ],
)
def test_absolute(tree: Path, path: str, expected: str) -> None:
    assert _filenames.absolute(path.format(tree)) == expected.format(tree)


def test_every_name_that_a_file_is_reached_by(tree: Path) -> None:
    spelled = f"{tree}//near/link/../../near/disk"
    expected = {spelled, f"{tree}/near/disk", f"{tree}/far/link2", f"{tree}/far/data"}
    assert _filenames.spellings(spelled) == expected


def test_names_that_lead_nowhere(tree: Path) -> None:
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("a")
    assert {f"{tree}/a", f"{tree}/b"} <= _filenames.spellings(f"{tree}/a")
    assert _filenames.spellings(f"{tree}/none") == {f"{tree}/none"}
    assert _filenames.real("") == ""


def test_no_name_is_shortened_by_its_letters_elsewhere() -> None:
    plugins = Path(__file__).parents[4] / "plugins"
    found = [
        f"{path.name}:{node.lineno}"
        for path in plugins.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in _LEXICAL and os.path.basename(str(path)) != "_filenames.py"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EACCES, "not let in"), (errno.ESTALE, "mount it again"), (errno.EIO, "journalctl"), (errno.ELOOP, "storage")],
)
def test_what_cannot_be_looked_at_is_not_missing(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def stat(path: str, *, follow_symlinks: bool = True) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_filenames.os, "stat", stat)
    with pytest.raises(SourceError, match=f"cannot be looked at .{os.strerror(code)}.*{words}"):
        _filenames.is_there("/x")
    assert words in _filenames.why_unseen("/x")


def test_what_is_there(tree: Path) -> None:
    (tree / "dangling").symlink_to("none")
    assert _filenames.is_there(f"{tree}/near/disk")
    assert not _filenames.is_there(f"{tree}/dangling") and _filenames.is_there(f"{tree}/dangling", follow=False)
    assert not _filenames.is_there(f"{tree}/far/data/x")
    assert _filenames.why_unseen(f"{tree}/none") == ""
