# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Numbers and units as descriptors write them: CIM units (DSP0004, annex C) in every notation, and older names. Pure."""

from __future__ import annotations

import re

MAX_NUMBER = 2**63 - 1
MAX_EXPONENT = 62
_NAMES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_LEGACY = re.compile(r"(kilo|mega|giga|tera|peta|kibi|mebi|gibi|tebi|pebi|[kmgtp]?)-?bytes?|([kmgtp]?)i?b")
_FACTOR = re.compile(r"\*(\d{1,20})(?:\^(\d{1,9}))?")


def number(text: str) -> int | None:
    """A whole number that is not negative, None for anything else. Decimal points are for rates only, but some write ``2.0``."""
    match = re.fullmatch(r"(\d{1,19})(?:\.0{1,9})?", text.strip(), re.ASCII)
    value = int(match.group(1)) if match else MAX_NUMBER + 1
    return value if value <= MAX_NUMBER else None


def factor(unit: str) -> int | None:
    """How many bytes one of a unit is; None for one that is not known, or absurd."""
    plain = re.sub(r"\s+", "", unit).lower()
    legacy = _LEGACY.fullmatch(plain)
    if legacy:
        return _NAMES[(legacy.group(1) or legacy.group(2) or "")[:1]]
    if not plain.startswith("byte"):
        return None
    rest = plain[len("bytes") :] if plain.startswith("bytes") else plain[len("byte") :]
    value, position = 1, 0
    while position < len(rest):
        match = _FACTOR.match(rest, position)
        if match is None:
            return None
        base, exponent = int(match.group(1)), int(match.group(2) or 1)
        if base == 0 or exponent > MAX_EXPONENT or (value := value * base**exponent) > MAX_NUMBER:
            return None
        position = match.end()
    return value
