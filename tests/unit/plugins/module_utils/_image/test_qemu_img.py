# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu-img takes every name for a plain file, every format as given, and never opens what an untrusted header names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import qemu

NAMES = ["plain", "nbd:localhost:1", "json:{}", "-n", "a,b=c", "with space", "ünïcode", "--output=json", "fat:rw:x"]


def create(path: Path, size: str = "1M", *options: str) -> str:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *options, "--", str(path), size)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_file(tmp_path: Path, name: str) -> None:
    base, overlay, raw = create(tmp_path / name), str(tmp_path / f"{name}.over"), str(tmp_path / f"{name}.raw")
    qemu_img.create_overlay(overlay, base, "qcow2")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", overlay)
    assert qemu_img.info(overlay, "qcow2").backing_file == base
    assert [layer.path for layer in qemu_img.backing_chain(overlay, "qcow2")] == [overlay, base]
    assert qemu_img.check(overlay, "qcow2").ok
    assert not qemu_img.is_in_use(overlay, "qcow2")
    qemu_img.commit(overlay, base)
    for untrusted in (False, True):
        qemu_img.convert(base, "qcow2", raw, "raw", untrusted=untrusted)
        assert Path(raw).read_bytes() == b"\x09" * 65536 + bytes((1 << 20) - 65536)
    qemu_img.rebase_unsafe(overlay, raw, "raw")
    found = qemu_img.info(overlay, "qcow2")
    assert (found.backing_file, found.backing_format, found.virtual_size_bytes) == (raw, "raw", 1 << 20)


def test_formats_are_as_given(tmp_path: Path) -> None:
    path = create(tmp_path / "a")
    assert qemu_img.info(path, "raw").format == "raw"
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ImageError, match=r"qemu-img info.*not in qcow2 format"):
        qemu_img.info(str(tmp_path / "text"), "qcow2")


def test_overlay_never_replaces_a_file(tmp_path: Path) -> None:
    base = create(tmp_path / "base")
    (tmp_path / "there").write_bytes(b"precious")
    with pytest.raises(ImageError, match="File exists"):
        qemu_img.create_overlay(str(tmp_path / "there"), base, "qcow2")
    assert (tmp_path / "there").read_bytes() == b"precious"
    qemu_img.create_overlay(str(tmp_path / "larger"), base, "qcow2", 5 << 20)
    assert qemu_img.info(str(tmp_path / "larger"), "qcow2").virtual_size_bytes == 5 << 20
    assert os.stat(tmp_path / "larger").st_mode & 0o777 == 0o600


def test_relative_names_are_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "a")
    for call in (
        lambda: qemu_img.info("a", "qcow2"),
        lambda: qemu_img.check("nbd:localhost:1", "qcow2"),
        lambda: qemu_img.rebase_unsafe(path, "base", "qcow2"),
        lambda: qemu_img.convert(path, "qcow2", "out", "raw"),
    ):
        with pytest.raises(ImageError, match="not absolute"):
            call()


def test_check_finds_damage_and_leaks(tmp_path: Path) -> None:
    path = create(tmp_path / "a")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128k", path)
    assert qemu_img.check(path, "qcow2", untrusted=True) == qemu_img.CheckResult(True, 0, 0, 0)
    block = 2 * 65536
    with open(path, "r+b") as file:
        file.seek(block + 2 * 5)
        one = file.read(2)
        file.seek(block + 2 * 5)
        file.write(b"\0\0")
        file.seek(block + 2 * 40)
        file.write(b"\0\1")
    assert one == b"\0\1"
    found = qemu_img.check(path, "qcow2")
    assert not found.ok and found.corruptions >= 1
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ImageError, match="qemu-img check"):
        qemu_img.check(str(tmp_path / "text"), "qcow2")


def test_check_does_not_open_the_backing_file(tmp_path: Path) -> None:
    path = create(tmp_path / "a")
    qemu_img.rebase_unsafe(path, "/does/not/exist", "qcow2")
    assert qemu_img.check(path, "qcow2", untrusted=True).ok
    assert qemu_img.info(path, "qcow2", untrusted=True).backing_file == "/does/not/exist"
    with pytest.raises(ImageError, match="/does/not/exist"):
        qemu_img.backing_chain(path, "qcow2")


def test_in_use(tmp_path: Path) -> None:
    path = create(tmp_path / "a")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "1 MiB" not in holder.stdout.readline():
            assert holder.poll() is None
        assert qemu_img.is_in_use(path, "qcow2")
        assert qemu_img.info(path, "qcow2").format == "qcow2"
        holder.stdin.close()
    assert not qemu_img.is_in_use(path, "qcow2")
    with pytest.raises(ImageError, match="No such file"):
        qemu_img.is_in_use(str(tmp_path / "missing"), "qcow2")


def test_limits_bind_untrusted_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a")
    monkeypatch.setattr(qemu_img, "_UNTRUSTED_MEMORY_BYTES", 8 << 20)
    with pytest.raises(ImageError):
        qemu_img.info(path, "qcow2", untrusted=True)
    assert qemu_img.info(path, "qcow2").format == "qcow2"


def test_a_large_image_gets_the_time_that_its_layers_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, top, target = create(tmp_path / "base"), create(tmp_path / "top"), tmp_path / "target"
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 512k", base)
    qemu_img.rebase_unsafe(top, base, "qcow2")
    target.touch()
    monkeypatch.setattr(qemu_img, "_UNTRUSTED_BYTES_PER_CPU_S", 1 << 10)
    given: list[int] = []

    def execute(command: list[str], path: str, *, cpu_s: int, timeout_s: float) -> subprocess.CompletedProcess[str]:
        given.append(cpu_s)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(qemu_img, "_execute", execute)
    qemu_img.convert(top, "qcow2", str(target), "raw", untrusted=True)
    qemu_img.convert(top, "qcow2", str(target), "raw")
    assert given == [600 + sum(os.stat(each).st_blocks * 512 >> 10 for each in (base, top)), 0]


def test_a_lost_layer_is_named(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base"), str(tmp_path / "top")
    qemu_img.create_overlay(top, base, "qcow2")
    os.unlink(base)
    with pytest.raises(ImageError, match=r"it stands on .*/base, which is not there"):
        qemu_img.backing_chain(top, "qcow2")


def test_missing_program_and_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="not installed"):
        qemu_img.info(path, "qcow2")
    slow = tmp_path / "qemu-img"
    slow.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(qemu_img, "_QUICK_S", 0.2)
    with pytest.raises(ImageError, match="did not finish"):
        qemu_img._run(["info"], path, timeout_s=0.2)
