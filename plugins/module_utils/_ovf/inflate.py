# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Inflates one zlib stream into a buffer, never more than fits: most of the processor time of a conversion is spent here.

Python's zlib makes each result in several pieces, keeps a window between them, and joins them. zlib itself, called once, writes
to where the bytes belong (7 % less processor time in all). `isal` and libdeflate are more than twice as fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import zlib
from typing import Any, Callable

from ansible_collections.kvmops.backup.plugins.module_utils import _libraries

Inflate = Callable[[memoryview, memoryview], int]
_DATA_ERROR, _BUFFER_ERROR = -3, -5  # zlib's
_NO_SPACE = 3  # libdeflate's


class InflateError(Exception):
    """The stream is damaged, cut off, or larger than the buffer."""


def best() -> Inflate:
    """The fastest way that this host has: a function of source and buffer, both writable, that returns how much it has written.

    Raises InflateError when called for a stream that does not end within both.
    """
    if _libraries.isal_zlib is not None:
        return functools.partial(in_pieces, _libraries.isal_zlib)
    return _of_libdeflate() or _of_libz() or functools.partial(in_pieces, zlib)


def in_pieces(library: Any, source: memoryview, buffer: memoryview) -> int:
    """By a library with zlib's interface in Python."""
    stream = library.decompressobj()
    try:
        data: bytes = stream.decompress(source, len(buffer) + 1)
    except library.error as error:
        raise InflateError(str(error)) from error
    if len(data) > len(buffer):
        raise InflateError("it is too large")
    if not stream.eof:
        raise InflateError("it is cut off")
    buffer[: len(data)] = data
    return len(data)


class _Decompressor:
    """libdeflate's, which is one thread's at a time."""

    def __init__(self, library: Any) -> None:
        self._free = library.libdeflate_free_decompressor
        self.handle = library.libdeflate_alloc_decompressor()
        if not self.handle:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._free(self.handle)


@functools.cache
def _of_libdeflate() -> Inflate | None:
    """By libdeflate, which many hosts have (libtiff needs it); None where it is not to be had."""
    library: Any = None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libdeflate.so.0")
        library.libdeflate_alloc_decompressor.argtypes = ()
        library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
        library.libdeflate_free_decompressor.argtypes = (ctypes.c_void_p,)
        library.libdeflate_free_decompressor.restype = None
        library.libdeflate_zlib_decompress.argtypes = (
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t),
        )  # fmt: skip
        library.libdeflate_zlib_decompress.restype = ctypes.c_int
    if library is None:
        return None
    own = threading.local()

    def inflate(source: memoryview, buffer: memoryview) -> int:
        begin, end = _addresses(source, buffer)
        if not hasattr(own, "decompressor"):
            own.decompressor = _Decompressor(library)
        done = ctypes.c_size_t()
        code = library.libdeflate_zlib_decompress(
            own.decompressor.handle, begin, len(source), end, len(buffer), ctypes.byref(done)
        )
        if code:
            raise InflateError("it is too large" if code == _NO_SPACE else "its data is damaged")
        return done.value

    return inflate


def _addresses(source: memoryview, buffer: memoryview) -> tuple[int, int]:
    """Where both are in memory, for as long as the caller keeps them."""
    if not (source.contiguous and buffer.contiguous and len(source) and len(buffer)):
        raise InflateError("it is empty")
    begin, end = ctypes.c_char.from_buffer(source), ctypes.c_char.from_buffer(buffer)
    return ctypes.addressof(begin), ctypes.addressof(end)


@functools.cache
def _of_libz() -> Inflate | None:
    """By zlib's own library, which Python's stands on as a rule; None where it is not to be had."""
    uncompress: Any = None
    with contextlib.suppress(OSError, AttributeError):
        uncompress = ctypes.CDLL("libz.so.1").uncompress
    if uncompress is None:
        return None
    uncompress.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulong), ctypes.c_void_p, ctypes.c_ulong)
    uncompress.restype = ctypes.c_int

    def inflate(source: memoryview, buffer: memoryview) -> int:
        begin, end = _addresses(source, buffer)
        done = ctypes.c_ulong(len(buffer))
        code = uncompress(end, ctypes.byref(done), begin, len(source))
        if code == _BUFFER_ERROR:
            raise InflateError("it is too large")
        if code:
            raise InflateError("its data is damaged" if code == _DATA_ERROR else f"zlib's error {code}")
        return done.value

    return inflate
