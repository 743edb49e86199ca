# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A test that cannot run "here" is skipped on a developer's machine; where everything is promised to be there, it fails."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    report = (yield).get_result()
    if report.skipped and os.environ.get("KVMOPS_TESTS_COMPLETE") and " here" in str(report.longrepr).lower():
        report.outcome = "failed"
