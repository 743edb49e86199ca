# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an overlay holds that its base does not; another size is something, too."""

from __future__ import annotations

import os
import subprocess

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import active_disks
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import Overlay
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import Content


def tool(*argv):
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture(params=["qcow2", "raw"])
def overlay(tmp_path, request):
    base, top = str(tmp_path / "base"), str(tmp_path / "top")
    tool("qemu-img", "create", "-q", "-f", request.param, base, "4M")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", request.param, "-b", base, top)
    return Overlay("vda", base, request.param, top)


def content(overlay, compare=False):
    return active_disks._content(overlay, compare=compare)


def test_nothing_in_it(overlay):
    assert content(overlay) is Content.EMPTY
    os.truncate(overlay.overlay_path, 0)
    assert content(overlay) is Content.EMPTY
    os.unlink(overlay.overlay_path)
    assert content(overlay) is Content.MISSING


def test_written_to(overlay):
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", overlay.overlay_path)
    assert content(overlay) is Content.DATA
    assert content(overlay, compare=True) is Content.NEWER


def test_resized_only(overlay):
    tool("qemu-img", "resize", "-q", "-f", "qcow2", overlay.overlay_path, "+64K")
    assert content(overlay) is Content.DATA
    os.utime(overlay.overlay_path, (1, 1))
    assert content(overlay, compare=True) is Content.OLDER
    tool("qemu-img", "resize", "-q", "-f", overlay.base_format, overlay.base_path, "+64K")
    assert content(overlay) is Content.EMPTY


def test_merged(overlay):
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", overlay.overlay_path)
    tool("qemu-io", "-f", overlay.base_format, "-c", "write -P 7 1M 64k", overlay.base_path)
    os.utime(overlay.overlay_path, (1, 1))
    assert content(overlay, compare=True) is Content.MERGED
