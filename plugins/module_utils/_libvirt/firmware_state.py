# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a VM's firmware and TPM keep on the host: the NVRAM file and swtpm's directory. Small, and read in one go.

The state of a TPM travels as a tar of the files in its directory, named as below ``swtpm/UUID`` ("tpm2/tpm2-00.permall"),
so that it can be put back by hand with ``tar -xf``.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import DomainView

MAX_STATE_BYTES = 64 * 2**20  # NVRAM has half a MiB, a TPM some KiB
_ATTEMPTS = 20  # a guest writes its variables seldom, and never for long
_VERSIONS = {"1.2": "tpm1.2", "2.0": "tpm2"}  # libvirt's names


def nvram_directory(conn: Connection) -> str:
    """Where libvirt keeps NVRAM."""
    return "/var/lib/libvirt/qemu/nvram" if _is_system(conn) else os.path.join(_configuration(), "nvram")


def nvram_path(conn: Connection, view: DomainView) -> str:
    """The NVRAM file of a VM; "" where there is none. A definition that leaves the firmware to libvirt does not name it."""
    directory = nvram_directory(conn)
    defaults = [os.path.join(directory, default_nvram(view.name, kind)) for kind in ("raw", "qcow2")]
    paths = [view.nvram_path] if view.nvram_path else defaults if view.firmware == "efi" else []
    return next((path for path in paths if _filenames.is_there(path) and os.path.isfile(path)), "")


def default_nvram(name: str, image_format: str) -> str:
    """The name that libvirt gives to the NVRAM file of a VM."""
    return f"{name}_VARS.{'qcow2' if image_format == 'qcow2' else 'fd'}"


def default_files(conn: Connection, name: str, uuid: str) -> frozenset[str]:
    """Where libvirt puts what firmware and TPM of a VM keep, unless its definition says otherwise."""
    variables = (os.path.join(nvram_directory(conn), default_nvram(name, kind)) for kind in ("raw", "qcow2"))
    return frozenset((*variables, os.path.join(tpm_directory(conn), uuid)))


def tpm_directory(conn: Connection) -> str:
    """Where libvirt keeps the state of emulated TPMs, a directory for each VM by its uuid."""
    return "/var/lib/libvirt/swtpm" if _is_system(conn) else os.path.join(_configuration(), "swtpm")


def tpm_state_path(conn: Connection, view: DomainView) -> str:
    """The directory with the state of a VM's emulated TPM; "" where there is none (yet), or it is a single file."""
    if view.tpm != "emulator" or view.tpm_file:
        return ""
    version = _VERSIONS.get(view.tpm_version or "2.0", "")
    path = view.tpm_source or os.path.join(tpm_directory(conn), view.uuid, version)
    return path if version and _filenames.is_there(path) and os.path.isdir(path) and _state_files(path) else ""


def read_file(path: str) -> bytes:
    """The bytes of a small file as they are at one moment. Raises SourceError."""
    return _at_rest([path], lambda: _read(path), path)


def read_tpm(directory: str) -> bytes:
    """The state in a TPM's directory as a tar. Raises SourceError."""
    version = next((name for name in _VERSIONS.values() if os.path.basename(directory) == name), _VERSIONS["2.0"])
    names = _state_files(directory)
    return _at_rest(
        [os.path.join(directory, name) for name in names], lambda: _pack(directory, version, names), directory
    )


def tpm_bytes(directory: str) -> int:
    """The size of the tar that `read_tpm` makes."""
    sizes = (os.path.getsize(os.path.join(directory, name)) for name in _state_files(directory))
    whole = sum(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for size in sizes)
    return -(-(whole + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def unpack_tpm(data: bytes, directory: str) -> None:
    """Puts the state of a TPM into a new directory (``swtpm/UUID``), durable. Raises HostileError for any other content."""
    os.mkdir(directory, 0o711)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                version, _slash, name = entry.name.partition("/")
                known = version in _VERSIONS.values() and name and "/" not in name and not name.startswith(".")
                content = archive.extractfile(entry) if known and entry.isreg() else None
                if content is None:
                    raise HostileError(f"The TPM state {entry.name[:80]!r}", "it is no file that a TPM keeps")
                below = os.path.join(directory, version)
                os.makedirs(below, mode=0o700, exist_ok=True)
                _write(os.path.join(below, name), content.read())
    except tarfile.TarError as error:
        raise HostileError("The TPM state", f"it is no tar ({error})") from error
    for version in os.listdir(directory):
        _files.sync_directory(os.path.join(directory, version))
    _files.sync_directory(directory)


def _is_system(conn: Connection) -> bool:
    return not str(conn.getURI()).endswith("/session")


def _configuration() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "libvirt/qemu")


def _state_files(directory: str) -> list[str]:
    """The files of a TPM's state; locks and sockets are none."""
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    return [name for name in names if stat.S_ISREG(os.lstat(os.path.join(directory, name)).st_mode)]


def _pack(directory: str, version: str, names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            content = _read(os.path.join(directory, name))
            entry = tarfile.TarInfo(f"{version}/{name}")
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _at_rest(paths: list[str], read: Callable[[], bytes], what: str) -> bytes:
    """Reads again until nothing was written meanwhile."""
    for _attempt in range(_ATTEMPTS):
        try:
            before = [_files.evidence(path) for path in paths]
            data = read()
            if [_files.evidence(path) for path in paths] == before:
                return data
        except FileNotFoundError:
            continue  # replaced by a newer one at this very moment
        except OSError as error:
            raise SourceError(f"The firmware's state {what}", f"it cannot be read ({error.strerror})") from error
    raise SourceError(f"The firmware's state {what}", "it is written to all the time", "Run the backup again.")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_STATE_BYTES + 1)
    if len(data) > MAX_STATE_BYTES:
        raise SourceError(f"The firmware's state {path}", f"it has more than {MAX_STATE_BYTES} bytes")
    return data


def _write(path: str, data: bytes) -> None:
    fd = _files.create(path)
    try:
        _files.write_all(fd, data, 0, path)
        _files.sync(fd, path)
    finally:
        os.close(fd)
