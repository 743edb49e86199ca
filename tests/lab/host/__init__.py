# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole hypervisor in a VM of its own: Debian with systemd, AppArmor and working KVM."""
