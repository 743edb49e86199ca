# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A watchdog that cannot start says why; what it does when it has, is seen with real guests (vm_recovery)."""

from __future__ import annotations

import os
import uuid

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.watchdog import Watchdog


def test_the_reason_is_told():
    pytest.importorskip("libvirt", reason="libvirt-python is not installed here")
    vm = str(uuid.uuid4())
    with pytest.raises(KvmopsError, match=r"it did not start: .*nowhere:///") as raised, Watchdog("nowhere:///", vm):
        pytest.fail("nothing watches over the guest")
    os.unlink(_locks._path(f"thaw-{vm}"))
    assert "Nothing was frozen" in raised.value.hint


@pytest.mark.parametrize("end", ["close", "die"])
def test_one_that_was_not_told_to_watch_goes_without_a_word(end):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed here")
    vm = str(uuid.uuid4())
    watchdog = Watchdog("nowhere:///", vm)
    if end == "close":
        watchdog.close()
    else:
        watchdog._process.stdin.close()  # what the death of the worker does
    assert watchdog._process.wait(timeout=60) == 0
    assert not os.path.lexists(_locks._path(f"thaw-{vm}"))
    for stream in (watchdog._process.stdout, watchdog._process.stderr):
        assert stream.closed or stream.read() == b""
        stream.close()
