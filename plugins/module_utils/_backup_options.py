# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The options of vm_backup and what it does with them: for the module itself, and for vm_backup_many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import COMPRESSION, PRIORITY, TARGET, URI
from ansible_collections.kvmops.backup.plugins.module_utils._backup.backup import backup
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._policy import WEEKDAYS
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    **PRIORITY,
    **COMPRESSION,
    "vm": {"type": "str", "required": True},
    "mode": {"type": "str", "choices": ["full", "incremental", "auto"], "default": "full"},
    "incrementable": {"type": "bool", "default": False},
    "archive": {"type": "path"},
    "increment_limit": {"type": "int", "default": 0},
    "increment_limit_deletes": {"type": "str", "choices": ["all", "own"], "default": "all"},
    "full_weekday": {"type": "str", "choices": list(WEEKDAYS)},
    "compress": {"type": "bool", "default": False},
    "consistency": {"type": "str", "choices": ["auto", "agent", "memory", "crash"], "default": "auto"},
    "include_iso": {"type": "bool", "default": True},
    "include_boot_files": {"type": "bool", "default": True},
    "include_secrets": {"type": "bool", "default": False},
    "max_age": {"type": "str"},
    "keep_last": {"type": "int"},
    "keep_days": {"type": "int"},
    "free_space": {"type": "bool", "default": False},
    "max_parallel": {"type": "int", "default": 0},
    "wait_timeout": {"type": "str"},
    "bandwidth": {"type": "str", "default": "0"},
    "digest": {"type": "str", "choices": ["auto", "xxh3-128", "sha256"], "default": "auto"},
    "unmerged": {"type": "str", "choices": ["warn", "fail"], "default": "warn"},
    "notes": {"type": "str"},
}
RULES: dict[str, Any] = {
    "required_one_of": [["pool", "path", "archive"]],
    "mutually_exclusive": [["pool", "path"]],
}
LIBRARIES = ("libvirt", "lxml", "zstandard")


def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The return values of vm_backup. Raises KvmopsError."""
    return backup(from_params(params), context)
