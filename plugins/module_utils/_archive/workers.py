# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Work on chunks by several threads, in bounded memory; the libraries that do the work release Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, TypeVar

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import ImageSource

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_DEFAULT_THREADS = 8  # about 12 MiB each; more saturate no storage we have met
MAX_THREADS = 16


def thread_count(asked: int) -> int:
    """Number of worker threads: what was asked for up to MAX_THREADS, or the processors this process may use."""
    return min(asked, MAX_THREADS) if asked > 0 else min(len(os.sched_getaffinity(0)), MAX_DEFAULT_THREADS)


class Workers:
    """A pool of threads; `ordered` maps a function over items and keeps their order. Use as a context manager."""

    def __init__(self, threads: int) -> None:
        self.threads = thread_count(threads)
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="chunk")

    def ordered(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, at most two more than there are threads ahead of the consumer."""
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) > self.threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def over(self, source: ImageSource, function: Callable[[int], Result]) -> Iterator[Result]:
        """`ordered` over the offsets of a source's chunks; late ones begin when every earlier one is done."""
        offsets = range(0, source.size_bytes, CHUNK_BYTES)
        early = len(offsets) if source.late_from >= source.size_bytes else source.late_from // CHUNK_BYTES
        yield from self.ordered(function, offsets[:early])
        for late in offsets[early:]:
            yield from self.ordered(function, (late,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is under way."""
        self._executor.shutdown(wait=True)
