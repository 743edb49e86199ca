# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for get-pip in ansible-test's environments: pip comes from ensurepip, the rest from the package index."""

from __future__ import annotations

import subprocess
import sys

# In a child process: ensurepip sets PIP_CONFIG_FILE, which would hide the machine's package index from what follows.
subprocess.check_call([sys.executable, "-m", "ensurepip"])
options = [argument for argument in sys.argv[1:] if not argument.startswith("--no-")]
subprocess.check_call([sys.executable, "-m", "pip", "install", *options])
