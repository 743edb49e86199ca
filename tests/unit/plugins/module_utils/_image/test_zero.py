# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Zeros are found, and nothing else is taken for them."""

from __future__ import annotations

import random

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero, nonzero_runs, zero_fill

BLOCK = 4096


@pytest.mark.parametrize("length", [0, 1, 511, 4096, 65536, 4 << 20, (9 << 20) + 3])
def test_one_byte_makes_the_difference(length: int) -> None:
    data = memoryview(bytearray(length))
    assert is_zero(data)
    for position in {0, length // 2, length - 1} if length else ():
        data[position] = 1
        assert not is_zero(data)
        data[position] = 0


def test_zero_fill() -> None:
    data = memoryview(bytearray(b"x" * ((9 << 20) + 3)))
    zero_fill(data[1:-1])
    assert is_zero(data[1:-1]) and data[0] == data[-1] == ord("x")


@pytest.mark.parametrize("seed", range(40))
def test_runs_against_a_plain_search(seed: int) -> None:
    rng = random.Random(seed)
    offset = rng.choice([0, 4096, 512, 1, 4095])
    data = bytearray(rng.choice([0, 1, 4096, 70_000, 700_001]))
    for _dummy in range(rng.randrange(12) if data else 0):
        start = rng.randrange(len(data))
        piece = rng.choice([1, 8, 4096, 30_000])
        length = len(data[start : start + piece])
        data[start : start + piece] = (b"\0" * 7 + b"\1" + bytes(length))[:length]
    covered = bytearray(len(data))
    for start, end in nonzero_runs(offset, memoryview(data)):
        assert start < end
        covered[start:end] = b"\1" * (end - start)
    assert not any(byte and not kept for byte, kept in zip(data, covered)), "data would be lost"
    for start in range(-offset % BLOCK, len(data) - BLOCK + 1, BLOCK):
        assert any(covered[start : start + BLOCK]) == any(data[start : start + BLOCK]), (
            "a block of zeros would be written"
        )
