# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests on a whole host: ./run-tests host [--debian RELEASE] [NAME…]. Each file has a fresh host; see tests/lab/README.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import PATH, RESTORED
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine, scratch


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A fresh host for the tests of one file. Console and journal stay when one of them fails."""
    name = Path(request.node.name).stem
    machine = Machine.up(
        scratch() / f"kvmops-host.{os.getpid()}-{name}", os.environ.get("KVMOPS_HOST_DEBIAN", "trixie")
    )
    machine.root("mkdir", "-p", PATH, RESTORED)
    failed_before = request.session.testsfailed
    try:
        yield machine
    finally:
        if request.session.testsfailed > failed_before:
            evidence = scratch() / "kvmops-host-failures" / name
            machine.keep_evidence(evidence)
            print(f"\nConsole and journal of the host: {evidence}")
        machine.down()
