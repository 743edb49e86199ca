# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Codes of warnings can be grepped, and each stands for something that some run may say."""

from __future__ import annotations

import re
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils import _notices
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice

SOURCES = Path(_notices.__file__).parent


def test_every_code_is_a_word_with_a_sentence_and_is_used() -> None:
    registry = (SOURCES / "_notices.py").read_text()
    used = {name for path in SOURCES.rglob("*.py") for name in re.findall(r"\bCode\.([A-Z_]+)\b", path.read_text())}
    for code in Code:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code.value) and code.name == code.value.replace("-", "_").upper()
        assert re.search(rf'{code.name} = "{code.value}"  # [A-Z][^.]*\.$', registry, re.MULTILINE), code
    assert used == {code.name for code in Code}


def test_the_object_is_named_where_it_is_known() -> None:
    assert Notice(Code.SPACE, "it is full").about("/srv") == Notice(Code.SPACE, "/srv: it is full")
    assert str(Notice(Code.SPACE, "it is full")) == "it is full"
