# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A test that cannot run "here" is skipped on a developer's machine; where everything is promised to be there, it fails."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from ansible_collections.kvmops.backup.plugins.module_utils._libraries import libvirt

# A busy machine is no bug.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _no_error_of_an_earlier_test() -> None:
    """libvirt's errors take their text from the last one that the library had, whosever it was."""
    if libvirt is not None:
        libvirt.virResetLastError()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    report = (yield).get_result()
    if report.skipped and os.environ.get("KVMOPS_TESTS_COMPLETE") and " here" in str(report.longrepr).lower():
        report.outcome = "failed"
