# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers, units and manifests in every notation that was seen."""

from __future__ import annotations

import hashlib

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import manifest, units

H1, H256, H384, H512 = (hashlib.new(name, b"x").hexdigest() for name in ("sha1", "sha256", "sha384", "sha512"))


@pytest.mark.parametrize(
    "unit, factor",
    [
        ("byte", 1), ("bytes", 1), ("byte * 2^20", 2**20), ("byte*2^20", 2**20), ("byte * 2 ^ 30", 2**30), ("Byte*2^10", 2**10),
        ("byte*1024*1024", 2**20), ("byte * 10^6", 10**6), ("MegaBytes", 2**20), ("megabyte", 2**20), ("GigaBytes", 2**30),
        ("KiloBytes", 2**10), ("TeraBytes", 2**40), ("MB", 2**20), ("GiB", 2**30), ("KB", 2**10), ("b", 1),
        ("byte * 2^9999", None), ("byte * 0", None), ("byte * -1", None), ("hertz * 10^6", None), ("parsec", None), ("", None),
        ("byte * 2^62 * 2^62", None), ("byte * 9" + "9" * 40, None),
    ],
)  # fmt: skip
def test_units(unit: str, factor: int | None) -> None:
    assert units.factor(unit) == factor


@pytest.mark.parametrize(
    "text, number",
    [("12", 12), (" 12 ", 12), ("2.0", 2), ("-1", None), ("1e9", None), ("", None), ("٣", None), ("9" * 30, None)],
)
def test_numbers(text: str, number: int | None) -> None:
    assert units.number(text) == number


@pytest.mark.parametrize(
    "line, name, algorithm, digits",
    [
        (f"SHA1(a.ovf)= {H1}", "a.ovf", "sha1", H1),
        (f"SHA1 (a.ovf) = {H1}", "a.ovf", "sha1", H1),
        (f"SHA256(a.ovf)={H256}", "a.ovf", "sha256", H256),
        (f"  SHA256  ( a.ovf )  =  {H256.upper()}  ".replace("( a.ovf )", "(a.ovf)"), "a.ovf", "sha256", H256),
        (f"SHA2-256(a.ovf)= {H256}", "a.ovf", "sha256", H256),
        (f"SHA-256(a.ovf)= {H256}", "a.ovf", "sha256", H256),
        (f"sha512(a.ovf)= {H512}", "a.ovf", "sha512", H512),
        (f"SHA384(a.ovf)= {H384}", "a.ovf", "sha384", H384),
        (f"SHA1(disk (1).vmdk)= {H1}", "disk (1).vmdk", "sha1", H1),
        (f"SHA1(./a.ovf)= {H1}", "a.ovf", "sha1", H1),
        (f"{H1}  a b.ovf", "a b.ovf", "sha1", H1),
        (f"{H256} *a.ovf", "a.ovf", "sha256", H256),
    ],
)
def test_line(line: str, name: str, algorithm: str, digits: str) -> None:
    for ending in ("", "\n", "\r\n"):
        assert manifest.parse(f"\n{line}{ending}".encode(), "m") == {name: manifest.Digest(algorithm, digits)}


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "no file at all"),
        (b"\r\n\r\n", "no file at all"),
        (b"nothing that is known\n", "cannot be read"),
        (f"SHA1(a)= {H256}\n".encode(), "does not fit"),
        (f"MD5(a)= {H1[:32]}\n".encode(), "MD5 is not known"),
        (f"SHA3-256(a)= {H256}\n".encode(), "not known"),
        (f"SHA1(a)= {H1}\nSHA1 a = {H1}\n".encode(), "line 2"),
    ],
)
def test_unreadable(data: bytes, why: str) -> None:
    with pytest.raises(ArchiveError, match=why):
        manifest.parse(data, "the manifest")


@pytest.mark.parametrize(
    "data",
    [
        f"SHA1(a)= {H1}\nSHA1(a)= {H1}\n",
        f"SHA1(../a)= {H1}\n",
        f"SHA1(/etc/passwd)= {H1}\n",
        f"SHA1(x/../../a)= {H1}\n",
        "SHA1(a)= " + "0" * (2 << 20),
    ],
)
def test_hostile(data: str) -> None:
    with pytest.raises(HostileError):
        manifest.parse(data.encode(), "the manifest")
