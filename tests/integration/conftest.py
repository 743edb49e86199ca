# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of all integration tests; what they give is described in tests/lab/README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import pytest

from ansible_collections.kvmops.backup.tests.lab import daemons, modules
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem
from ansible_collections.kvmops.backup.tests.lab.vm import Lab

_IMAGES = Path("/var/lib/libvirt/images")


@pytest.fixture(scope="session", autouse=True)
def private_environment() -> None:
    """These tests kill daemons and make VMs: never on the host itself."""
    if not daemons.is_private():
        pytest.exit("integration tests run in a private environment: ./run-tests integration [TARGET]", returncode=2)


def _lab(name: str) -> Lab:
    daemons.start()
    return Lab(_IMAGES / re.sub(r"[^\w-]+", "-", name))


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """An empty lab for one test."""
    with _lab(request.node.name) as value:
        yield value


@pytest.fixture(scope="module")
def module_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab that the tests of one file share, for VMs that are expensive to boot."""
    with _lab(Path(request.node.name).stem) as value:
        yield value


@pytest.fixture
def loop_fs(lab: Lab) -> Iterator[Callable[[str, int], LoopFileSystem]]:
    """``loop_fs("xfs", 300)``: a mounted file system of that many MiB, gone after the test."""
    with ExitStack() as stack:
        yield lambda kind, size_mib: stack.enter_context(LoopFileSystem(kind, size_mib, lab.directory / "loop"))


@pytest.fixture
def run_module() -> Callable[..., modules.ModuleResult]:
    """Runs a module directly: ``run_module("vm_backup", vm="web01", path="/backups")``."""
    return modules.run_module


@pytest.fixture
def ansible() -> modules.Ansible:
    """Runs modules and playbooks through real Ansible."""
    return modules.Ansible()
