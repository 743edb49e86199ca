# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests, the benchmarks and the quickstart need: see README.md in this directory."""
