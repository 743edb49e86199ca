# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a guest sees of an image, whatever its layout: read through qemu-nbd on a private socket.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, fixed newstyle with simple replies. QEMU opens what
headers name: images that others made are to be probed before, and served as untrusted.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tempfile
from types import TracebackType

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_NEWSTYLE_NO_ZEROES, _EXPORT_NAME, _READ = 3, 1, 0
# qemu-nbd takes a socket that listens already (systemd's protocol), so nobody has to wait for its file to appear
_SERVE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 0</dev/null'


class ServedImage:
    """An image that qemu-nbd serves read-only as long as this context manager is open. Raises ImageError.

    qemu-nbd ends by itself with its last connection, so a killed process leaves none behind.
    """

    def __init__(
        self, path: str, fmt: str, *, connections: int, window: tuple[int, int] | None = None, untrusted: bool = False
    ) -> None:
        """``window``: offset and size of the image within the file. ``untrusted``: others made it; qemu-nbd's memory and CPU time
        are bounded then, and it opens no backing file."""
        self._path = path
        with tempfile.TemporaryDirectory(dir=_paths.run_dir()) as directory:
            address = os.path.join(directory, "nbd")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(address)
                listener.listen(connections)
                image = ["-f", fmt, "--", _filenames.absolute(path)]
                if window or untrusted:
                    image = ["--", "json:" + json.dumps(qemu_img.block_device(_filenames.absolute(path), fmt, window))]
                limits = qemu_img.limits([path]) if untrusted else []
                options = ["--read-only", f"--shared={connections}", *image]
                command = ["sh", "-c", _SERVE, "sh", *limits, "qemu-nbd", *options]
                self._server = subprocess.Popen(command, stdin=listener.fileno(), stderr=subprocess.PIPE)
                self._sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _number in range(connections)]
                for each in self._sockets:
                    each.connect(address)
        try:
            sizes = {self._greet(each) for each in self._sockets}
        except BaseException:
            self.close()
            raise
        self.size_bytes = sizes.pop()

    def __enter__(self) -> ServedImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections, and qemu-nbd with them."""
        for each in self._sockets:
            each.close()
        self._server.terminate()
        self._server.wait()
        if self._server.stderr:
            self._server.stderr.close()

    def read(self, connection: int, offset: int, buffer: memoryview) -> None:
        """Fills the buffer; one thread at a time per connection."""
        link = self._sockets[connection]
        try:
            link.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, connection, offset, len(buffer)))
            magic, error, _handle = _REPLY.unpack(self._receive(link, _REPLY.size))
            if magic != _REPLY_MAGIC or error:
                raise ImageError(f"disk image {self._path}", f"it cannot be read at {offset}: {os.strerror(error)}")
            self._fill(link, buffer)
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def _greet(self, link: socket.socket) -> int:
        try:
            magic, option_magic, _flags = _GREETING.unpack(self._receive(link, _GREETING.size))
            if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
                raise self._failed("qemu-nbd speaks another protocol")
            link.sendall(_OPTION.pack(_NEWSTYLE_NO_ZEROES, b"IHAVEOPT", _EXPORT_NAME, 0))
            size_bytes, _flags = _EXPORT.unpack(self._receive(link, _EXPORT.size))
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error
        return int(size_bytes)

    def _receive(self, link: socket.socket, length: int) -> bytearray:
        data = bytearray(length)
        self._fill(link, memoryview(data))
        return data

    def _fill(self, link: socket.socket, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = link.recv_into(buffer[done:])
            if not count:
                raise self._failed("qemu-nbd has ended")
            done += count

    def _failed(self, why: str) -> ImageError:
        """With what qemu-nbd has said, which is the reason where it could not open the image."""
        self._server.terminate()
        said = self._server.stderr.read().decode(errors="replace").strip() if self._server.stderr else ""
        return ImageError(f"disk image {self._path}", said or why)
