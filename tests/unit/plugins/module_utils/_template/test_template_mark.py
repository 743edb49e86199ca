# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mark in a definition, beside whatever else is in its metadata."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark

BARE = "<domain type='qemu'><name>base</name></domain>"
OTHERS = (
    "<domain type='qemu'><name>base</name><metadata><a:x xmlns:a='urn:a'/>"
    "<kvmops:restored xmlns:kvmops='urn:kvmops:backup:1'/></metadata></domain>"
)


@pytest.mark.parametrize("xml", [BARE, OTHERS])
def test_put_and_taken_away_leaves_the_definition_as_it_was(xml: str) -> None:
    root = _xml.parse(xml, "domain")
    before = _xml.text(root)
    assert not mark.is_marked(root)
    mark.put(root, True)
    mark.put(root, True)
    assert mark.is_marked(_xml.parse(_xml.text(root), "domain"))
    assert _xml.text(root).count("kvmops-template:template") == 1
    mark.put(root, False)
    assert _xml.text(root) == before
