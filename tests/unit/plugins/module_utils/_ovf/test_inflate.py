# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each way to inflate a grain gives the same bytes and the same refusals, and none writes behind the buffer."""

from __future__ import annotations

import concurrent.futures
import functools
import random
import zlib

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _libraries
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import inflate

SIZE = 65536
WORDS = b" ".join(b"%d word" % number for number in range(9000))[:SIZE]


@pytest.fixture(params=["libz", "libdeflate", "zlib", "isal"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> inflate.Inflate:
    """The way that a host takes which has just this library."""
    if request.param == "isal":
        isal = pytest.importorskip("isal.isal_zlib")
        chosen = inflate.best()
        assert isinstance(chosen, functools.partial) and chosen.args == (isal,)  # it is taken where it is installed
        return chosen
    monkeypatch.setattr(_libraries, "isal_zlib", None, raising=False)
    if request.param == "libdeflate":
        chosen = inflate._of_libdeflate()
        if chosen is None:
            pytest.skip("libdeflate is not installed here")
        assert inflate.best() is chosen
        return chosen
    monkeypatch.setattr(inflate, "_of_libdeflate", lambda: None)
    if request.param == "libz":
        assert inflate.best() is inflate._of_libz() is not None
    else:
        monkeypatch.setattr(inflate, "_of_libz", lambda: None)
    return inflate.best()


def test_by_many_threads(way: inflate.Inflate) -> None:
    stream = zlib.compress(WORDS)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _number: inflated(way, stream), range(400))) == {WORDS}


def inflated(way: inflate.Inflate, stream: bytes, size: int = SIZE) -> bytes:
    """In a buffer between two others."""
    space = memoryview(bytearray(b"\xee" * (size + 64)))
    length = way(memoryview(bytearray(stream)), space[32 : 32 + size])
    assert bytes(space[:32]) == bytes(space[32 + size :]) == b"\xee" * 32
    return bytes(space[32 : 32 + length])


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("data", [b"x", bytes(SIZE), WORDS, random.Random(1).randbytes(SIZE), WORDS[:777]])
def test_the_same_bytes(way: inflate.Inflate, data: bytes, level: int) -> None:
    assert inflated(way, zlib.compress(data, level)) == data
    assert inflated(way, zlib.compress(data, level) + b"what follows it in the file") == data


@pytest.mark.parametrize(
    "stream",
    [
        b"", b"\xff" * 100, zlib.compress(WORDS)[:-9], zlib.compress(WORDS)[:-1], zlib.compress(WORDS)[:-4] + b"\1\2\3\4",
        zlib.compress(WORDS + b"x"), zlib.compress(bytes(100 << 20), 9), zlib.compress(WORDS)[1:],
    ],
    ids=["empty", "garbage", "cut off", "cut off by a byte", "wrong checksum", "a byte too large", "a bomb", "no header"],
)  # fmt: skip
def test_refused(way: inflate.Inflate, stream: bytes) -> None:
    with pytest.raises(inflate.InflateError):
        inflated(way, stream)
