# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which snapshots backups have left on a VM: told by name and description, everywhere alike."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots, run
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import LayeredSnapshot, Layers


def test_our_snapshots_are_known_by_name_and_description():
    def made(name, description):
        document = snapshots.document(name, description, [("vda", "/i/x")], [])
        return snapshots.describe(document, current=False)

    archive = "/backups/a b_20261122T010000Z_6f1a2b3c.tar"
    ours = made("kvmops-17", backup_snapshots.description(archive))
    assert backup_snapshots.of_vm([ours]) == (backup_snapshots.BackupSnapshot("kvmops-17", archive),)
    others = [
        made("kvmops-17", "Temporary, made by kvmops.backup for /b/x.tar; it goes when the copy is done."),
        made("kvmops-17", ""),
        made("before upgrade", backup_snapshots.description("/backups/x.tar")),
        made("kvmops-17x", backup_snapshots.description("/backups/x.tar")),
    ]
    assert backup_snapshots.of_vm(others) == ()


def test_overlay_names_do_not_grow():
    path = "/i/web.qcow2"
    for number in range(1, 4):
        path = backup_snapshots.overlay_path(path, f"kvmops-{number}", 255)
    assert path == "/i/web.qcow2.kvmops-3.qcow2"
    assert backup_snapshots.overlay_path("/i/web.before-upgrade", "kvmops-1", 255) == "/i/web.before-upgrade.kvmops-1.qcow2"


@pytest.mark.parametrize("description", [backup_snapshots.description("/backups/x.tar"), "of a user"])
def test_a_snapshot_of_a_user_that_is_named_like_ours_ends_no_cycle(monkeypatch, description):
    ended = []
    monkeypatch.setattr(_vm_state, "end_cycle", lambda _uuid, reason: ended.append(reason))
    document = snapshots.document("kvmops-17", description, [("vda", "/i/x")], [])
    state = LayeredSnapshot(snapshots.describe(document, current=True), ())
    layers = Layers("u", "web", False, False, (state,), {}, {}, {})
    run._end_cycle(layers, ["kvmops-17"], "its snapshot was removed")
    assert bool(ended) is (description != "of a user")
