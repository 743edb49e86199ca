# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disk images: probing hostile files, sources and sinks of archive members, qemu-img. Knows nothing of libvirt."""
