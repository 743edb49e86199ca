# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The collection's version, as archives name it; a unit test holds it and galaxy.yml together."""

from __future__ import annotations

VERSION = "0.1.0"
