# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options and fixtures of the recovery tests."""

from __future__ import annotations

import random

import pytest

from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def pytest_addoption(parser):
    parser.addoption(
        "--kill-points", type=int, default=20, help="moments at which libvirtd is killed inside one snapshot"
    )
    parser.addoption("--seed", type=int, default=2, help="seed of these moments")


@pytest.fixture
def moments(request):
    """moments(limit_s): that many different delays from 0 to a limit, one in each of as many equal slices."""
    count, seed = request.config.getoption("--kill-points"), request.config.getoption("--seed")
    print(f"seed {seed}, {count} points")
    return lambda limit_s: [
        (number + random.Random(seed + number).random()) * limit_s / count for number in range(count)
    ]


@pytest.fixture(scope="module")
def two(module_lab):
    """A writing VM with an agent, a qcow2 and a raw disk."""
    return module_lab.create_vm("two disks", [Disk(), Disk("raw")])
