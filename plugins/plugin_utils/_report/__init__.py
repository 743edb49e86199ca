# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The report on the state of all backups: what it says (`model`), as a page (`page`, `charts`) and as metrics (`metrics`)."""
