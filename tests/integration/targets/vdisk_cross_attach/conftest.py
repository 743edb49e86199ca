# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of the sweep, and the VMs that several files share: each boot takes seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab


def pytest_addoption(parser):
    parser.addoption(
        "--kill-steps", type=int, default=3, help="steps of each sweep at which the worker is killed; 0: all"
    )
    parser.addoption("--seed", type=int, default=3, help="seed of the choice of these steps")


@pytest.fixture
def chosen(request):
    """chosen(count): some of the numbers from 1 to count, the first and the last among them."""
    limit, seed = request.config.getoption("--kill-steps"), request.config.getoption("--seed")
    print(f"seed {seed}")

    def choose(count):
        if not limit or count <= limit:
            return list(range(1, count + 1))
        return sorted({1, count, *random.Random(seed).sample(range(2, count), limit - 2)})

    return choose


@pytest.fixture(scope="session")
def shared_lab(private_environment):
    daemons.start()
    with Lab(Path("/var/lib/libvirt/images/vdisk_cross_attach")) as lab:
        yield lab


@pytest.fixture(scope="session")
def source(shared_lab):
    """A busy VM; a freeze stops its writer and tells what was on its disks."""
    vm = shared_lab.create_vm("web01", [Disk(), Disk("raw")], freeze_mode="pause")
    vm.wait_for_marker(2)
    return vm


@pytest.fixture(scope="session")
def receiver(shared_lab):
    """An appliance, up and without any disk of others at the begin and end of each test."""
    return shared_lab.create_vm("backup01", writer=False, extra_devices=appliance.PORTS)
