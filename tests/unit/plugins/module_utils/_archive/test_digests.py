# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives of every digest algorithm are read and checked, whatever this processor prefers."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

HERE = Path(__file__).parent / "data"
PEERS = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b-256": lambda data: hashlib.blake2b(data, digest_size=32).digest(),
    "xxh3-128": lambda data: bytes.fromhex(
        subprocess.run(["xxhsum", "-H2"], input=data, stdout=subprocess.PIPE, check=True).stdout.split()[0].decode()
    ),
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


@pytest.mark.parametrize("name", PEERS)
def test_other_threads_run_while_one_hashes(name: str) -> None:
    data = memoryview(b"x" * 2**26)
    events: list[str] = []

    def work() -> None:
        events.append("begun")
        digests.ALGORITHMS[name].of_chunk(data)
        events.append("done")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # a thread loses Python's lock only where it gives it up
    try:
        for _attempt in range(100):  # a busy machine may not let this thread run in time
            events.clear()
            thread = threading.Thread(target=work)
            thread.start()
            while not events:
                time.sleep(0)
            overlapped = events == ["begun"]
            thread.join()
            if overlapped:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail(f"{name} keeps Python's lock")


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
    monkeypatch.setattr(digests, "xxhash", None)
    monkeypatch.setattr("builtins.open", lambda *_a, **_k: io.StringIO("processor\t: 0\n" + cpuinfo))
    assert digests.fastest.__wrapped__().name == name


def test_xxh3_where_its_library_is() -> None:
    assert digests.fastest() is digests.XXH3 is digests.chosen("auto")
    assert digests.chosen("sha256") is digests.SHA256


@pytest.mark.parametrize("compressed", [False, True])
def test_without_the_library(compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that needs no digest goes on; the rest names the package, and never calls it damage."""
    path = archives.write(tmp_path, archives.SMALL, compressed=compressed).path
    monkeypatch.setattr(digests, "xxhash", None)
    monkeypatch.setattr(digests, "fastest", digests.fastest.__wrapped__)
    with open_archive(path) as reader:
        assert reader.point().digest_algorithm == "xxh3-128"
    for use in (verify_file, archives.extract, lambda path: archives.append(path, {"vda_1.snapshot": b"new"})):
        with pytest.raises(RefusedError, match="xxhash is not installed") as caught:
            use(path)
        assert "python3-xxhash" in caught.value.hint
    with pytest.raises(RefusedError, match="Option digest"):
        digests.chosen("xxh3-128")
    assert verify_file(archives.write(tmp_path, archives.SMALL, name="b.tar").path).ok  # of what this host can do


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_archives_of_before(name: str, suffix: str, tmp_path: Path) -> None:
    """Archives that were written once and lie here: whatever is changed, they are read, continued and restored."""
    path = shutil.copy(HERE / f"{name}{suffix}", tmp_path)
    assert verify_file(path).ok
    assert archives.extract(path) == archives.SMALL
    added = archives.append(path, {"vda_1.snapshot": b"new"})
    assert added.configuration.digest_algorithm == name and verify_file(path).ok
