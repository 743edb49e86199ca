# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state of a TPM as a tar and back; what is none is refused."""

from __future__ import annotations

import io
import tarfile

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import firmware_state


def test_there_and_back(tmp_path):
    state = tmp_path / "tpm2"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"\x01" * 6101)
    (state / "tpm2-00.volatilestate").write_bytes(b"v")
    (state / ".lock").write_bytes(b"")
    data = firmware_state.read_tpm(str(state))
    with tarfile.open(fileobj=io.BytesIO(data)) as members:
        assert members.getnames() == ["tpm2/tpm2-00.permall", "tpm2/tpm2-00.volatilestate"]
    assert data == firmware_state.read_tpm(str(state))  # nothing in it depends on when it was read
    firmware_state.unpack_tpm(data, str(tmp_path / "uuid"))
    back = tmp_path / "uuid" / "tpm2"
    assert (back / "tpm2-00.permall").read_bytes() == b"\x01" * 6101 and (
        back / "tpm2-00.volatilestate"
    ).read_bytes() == b"v"
    assert sorted(path.name for path in back.iterdir()) == ["tpm2-00.permall", "tpm2-00.volatilestate"]
    assert back.stat().st_mode & 0o777 == 0o700 and (back / "tpm2-00.permall").stat().st_mode & 0o777 == 0o600


def packed(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(entry, io.BytesIO(b"data"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        packed("../tpm2/x"),
        packed("/etc/passwd"),
        packed("tpm2/../../x"),
        packed("tpm2/a/b"),
        packed("tpm2/.hidden"),
        packed("tpm2"),
        packed("elsewhere/x"),
        packed("tpm2/x", tarfile.SYMTYPE, "/etc/shadow"),
        packed("tpm2/x", tarfile.LNKTYPE, "tpm2/y"),
        packed("tpm2/x", tarfile.CHRTYPE),
        b"no tar at all" * 100,
    ],
)
def test_what_is_no_state_is_refused(tmp_path, data):
    with pytest.raises(HostileError):
        firmware_state.unpack_tpm(data, str(tmp_path / "uuid"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == []


def test_a_file_that_is_replaced_meanwhile_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "vars.fd"
    path.write_bytes(b"old")
    calls = []
    real = firmware_state._read

    def read(at):
        data = real(at)
        if not calls:
            path.unlink()
            path.write_bytes(b"new one")
        calls.append(data)
        return data

    monkeypatch.setattr(firmware_state, "_read", read)
    assert firmware_state.read_file(str(path)) == b"new one" and calls == [b"old", b"new one"]


def test_what_never_rests_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "vars.fd"
    path.write_bytes(b"")
    monkeypatch.setattr(firmware_state, "_read", lambda at: path.write_bytes(path.read_bytes() + b"x") and b"")
    with pytest.raises(SourceError, match="all the time"):
        firmware_state.read_file(str(path))


def test_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(firmware_state, "MAX_STATE_BYTES", 10)
    (tmp_path / "x").write_bytes(bytes(11))
    with pytest.raises(SourceError, match="more than 10"):
        firmware_state.read_file(str(tmp_path / "x"))
