# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives of either digest algorithm are read and checked, whatever this processor prefers."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import archives
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file

PEERS = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b-256": lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}


@pytest.mark.parametrize("name", PEERS)
def test_each_algorithm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(digests, "fastest", lambda: digests.ALGORITHMS[name])
        path = archives.write(tmp_path, archives.SMALL).path
    with open_archive(path) as reader:
        point = reader.point()
        assert point.digest_algorithm == name
    with tarfile.open(path) as tar:
        file = tar.extractfile(point.digests_member)
        assert file is not None
        blob = file.read()
    assert blob == bytes(512) + b"".join(PEERS[name](data) for data in archives.SMALL.values())
    assert PEERS[name](blob).hex() == point.digests_digest
    assert verify_file(path).ok
    assert archives.extract(path) == archives.SMALL
    data = bytearray(Path(path).read_bytes())
    data[data.index(b"disk adisk a")] ^= 1
    Path(path).write_bytes(data)
    assert [damage.member for damage in verify_file(path).damage] == ["vda_0.qcow2"]


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("flags\t\t: fpu sse4_2 sha_ni avx2\n", "sha256"),
        ("flags\t\t: fpu sse4_2 avx2\n", "blake2b-256"),
        ("Features\t: fp asimd sha1 sha2\n", "sha256"),
        ("Features\t: fp asimd\n", "blake2b-256"),
    ],
)
def test_choice(cpuinfo: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_a, **_k: io.StringIO("processor\t: 0\n" + cpuinfo))
    assert digests.fastest.__wrapped__().name == name
