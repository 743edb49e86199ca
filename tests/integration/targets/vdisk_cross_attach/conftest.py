# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of the sweep."""

from __future__ import annotations

import random

import pytest


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
