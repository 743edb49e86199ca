# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Text that others wrote (guests, archives, notes, file names) on its way to results, logs and terminals.

What must not pass is shown as the percent escapes of its bytes, as in a URL: unlike a backslash that passes through a command
line, YAML and Jinja as it is. Python keeps bytes of names that are not UTF-8 as lone surrogates, which Ansible and XML refuse.
"""

from __future__ import annotations

import re
from typing import Any

# Of a message; lists of files and the like are shorter.
LONGEST_CHARACTERS = 2000
# Of one text in a result: notes and definitions are shorter, an archive may hold megabytes.
LONGEST_IN_RESULTS = 100_000
# Surrogates, controls other than tab and line ends, and what changes the direction of the text around it.
_NEVER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """A name or any other text, without characters that do something else than print."""
    return _NEVER.sub(_escape, text)


def all_shown(value: Any) -> Any:
    """A result (dicts, lists, strings and so on) with every string in it as `shown`, and none endless."""
    if isinstance(value, str):
        return shown(_cut(value, LONGEST_IN_RESULTS))
    if isinstance(value, dict):
        return {all_shown(key): all_shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_shown(each) for each in value]
    return value


def printable(text: str) -> str:
    """A message, whatever it quotes: `shown`, in one line, and not endless."""
    return shown(" ".join(_cut(text, LONGEST_CHARACTERS).splitlines()))


def _cut(text: str, longest: int) -> str:
    more = len(text) - longest
    return f"{text[:longest]} ... ({more} more characters)" if more > 0 else text


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    undecoded = "\udc80" <= character <= "\udcff"
    raw = character.encode(errors="surrogateescape" if undecoded else "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in raw)
