# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tables of an overlay tell, whatever it stands on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image import layers, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import qemu


@pytest.mark.parametrize("options", ["cluster_size=65536", "cluster_size=512", "extended_l2=on", "compat=0.10"])
@pytest.mark.parametrize("written", ["", "write 0 512", "write -z 1G 64k", "write 31G 4k"])
def test_an_overlay_has_data_when_something_was_written_to_it(tmp_path: Path, options: str, written: str) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    qemu("qemu-img", "create", "-q", "-f", "raw", str(base), "32G")
    qemu("qemu-io", "-f", "raw", "-c", "write 1M 1M", str(base))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-F", "raw", "-b", str(base), str(overlay))
    assert not layers.has_data(str(overlay))
    if written:
        qemu("qemu-io", "-f", "qcow2", "-c", written, str(overlay))
    os.unlink(base)  # nothing below it is looked at
    assert layers.has_data(str(overlay)) == bool(written)


def test_what_is_no_qcow2(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"QFI\xfb")
    for name in ("a", "missing"):
        with pytest.raises(ImageError):
            layers.has_data(str(tmp_path / name))


def test_a_file_that_cannot_be_read_ends_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of all VMs are looked at in every run: a failing disk of one must not stop the backup of all others."""
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(overlay))
    assert layers.below(str(overlay)) == [str(overlay), str(base)]

    def failing(_fd: int, _length: int, _offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    assert layers.below(str(overlay)) == [str(overlay)]


@pytest.mark.parametrize(
    "spelled",
    [
        "{0}",
        "file:{0}",
        'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{0}"}}}}',
        'json:{{"driver":"qcow2","file.driver":"file","file.filename":"{0}"}}',
        'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{0}","locking":"auto"}},"discard":"unmap"}}',
    ],
)
def test_however_the_file_below_is_spelled(tmp_path: Path, spelled: str) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", spelled.format(base), str(overlay))
    assert layers.below(str(overlay)) == [str(overlay), str(base)]
    top, below = qemu_img.backing_chain(str(overlay), "qcow2")
    assert (top.full_backing_file, below.path) == (str(base), str(base))


@pytest.mark.parametrize(
    "name",
    [
        "nbd://host/disk",
        "file:relative",
        "json:[",
        "json:7",
        "json:" + "[" * 1018,
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"relative"}}',
        'json:{"driver":"qcow2","file":{"driver":"nbd","filename":"/a"}}',
        'json:{"driver":"quorum","children":[{"filename":"/a"}]}',
        'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"/a"}}',
        json.dumps({"driver": "raw", "file": {"filename": "/a"}, "backing": {"filename": "/b"}}),
    ],
)
def test_what_is_not_simply_a_file(name: str) -> None:
    assert layers.named_file(name) == name


def test_a_link_in_a_backing_name_is_followed_before_its_dots(tmp_path: Path) -> None:
    """The kernel opens far/base.qcow2; the letters alone say near/base.qcow2."""
    far, near = tmp_path / "far", tmp_path / "near"
    (far / "inner").mkdir(parents=True)
    near.mkdir()
    (near / "link").symlink_to(far / "inner")
    for place in (far, near):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", str(place / "base.qcow2"), "1M")
    overlay = near / "overlay"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "link/../base.qcow2", str(overlay))
    assert layers.below(str(overlay)) == [str(overlay), str(far / "base.qcow2")]
    assert layers.names_below(str(overlay)) == [str(overlay), f"{near}/link/../base.qcow2"]


def test_a_backing_name_lies_beside_the_name_that_qemu_is_given(tmp_path: Path) -> None:
    images, store = tmp_path / "images", tmp_path / "store"
    for place in (images, store):
        place.mkdir()
        qemu("qemu-img", "create", "-q", "-f", "qcow2", str(place / "base"), "1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", str(store / "data"))
    (images / "disk.0").symlink_to(store / "data")
    assert layers.below(str(images / "disk.0")) == [str(store / "data"), str(images / "base")]
