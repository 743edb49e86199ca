# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Directories of the collection on the host it runs on."""

from __future__ import annotations

import os
import stat

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError


def _directory(system: str, variable: str, fallback: str) -> str:
    if os.geteuid() == 0:
        path = os.path.join(system, "kvmops-backup")
    else:
        base = os.environ.get(variable) or os.path.join(os.path.expanduser("~"), fallback)
        path = os.path.join(base, "kvmops-backup")
    os.makedirs(path, mode=0o700, exist_ok=True)
    why = _why_not_private(os.stat(path), os.geteuid())
    if why:
        raise RefusedError(
            f"The directory {path}", why, f"Make it yours alone (chown, chmod 700 {path}), or remove it."
        )
    return path


def _why_not_private(status: os.stat_result, user: int) -> str:
    """Why others could put files into a directory, "" where they cannot. Locks, journals and evidence are believed."""
    if status.st_uid not in (0, user):
        return f"it belongs to the user {status.st_uid}, who could forge what is kept there"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it, and could forge what is kept there"
    return ""


def read_only_file() -> str:
    """The administrator's list of places that nothing may be written to; see _settings."""
    return _setting("read-only")


def trusted_owners_file() -> str:
    """The administrator's list of users whose archives in a place count as ours; see _settings."""
    return _setting("trusted-owners")


def _setting(name: str) -> str:
    if os.geteuid() == 0:
        return f"/etc/kvmops-backup/{name}"
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "kvmops-backup", name)


def state_dir() -> str:
    """Journals, locks and evidence; survives a reboot."""
    return _directory("/var/lib", "XDG_STATE_HOME", ".local/state")


def run_dir() -> str:
    """Status files of running operations; gone after a reboot."""
    return _directory("/run", "XDG_RUNTIME_DIR", ".cache")


def cache_dir() -> str:
    """What can be computed again."""
    return _directory("/var/cache", "XDG_CACHE_HOME", ".cache")
