# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's log of a private environment, where nobody else listens."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def system_log() -> Iterator[list[str]]:
    """What is written into the host's log in the block, complete after it."""
    lines: list[str] = []
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("/dev/log")
        log.settimeout(0.2)

        def listen() -> None:
            while not ended.is_set():
                with suppress(socket.timeout):
                    lines.append(log.recv(65536).decode())

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield lines
        finally:
            ended.set()
            listener.join()
            os.unlink("/dev/log")
