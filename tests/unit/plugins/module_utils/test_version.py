# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The version that archives name is that of the collection."""

from __future__ import annotations

import re
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._version import VERSION


def test_version_is_that_of_galaxy():
    galaxy = (Path(__file__).parents[4] / "galaxy.yml").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", galaxy, re.MULTILINE).group(1) == VERSION
