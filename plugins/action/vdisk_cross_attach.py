# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.plugin_utils._progress_action import ProgressActionModule as ActionModule

__all__ = ["ActionModule"]
