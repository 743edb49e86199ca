# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
requirements:
  - lxml (C(python3-lxml))
  - zstandard (C(python3-zstandard))
  - xxhash (C(python3-xxhash)) for archives with digests of this kind
"""

    COMPRESSION = r"""
options:
  compress_level:
    description:
      - Level of the zstd compression, 1 (fastest) to 19 (smallest).
      - Level 2 is 1.6 times as fast as level 3 for 2 percent more bytes.
    type: int
    default: 2
  threads:
    description:
      - How many threads compress and compute digests; V(0) means one per core.
    type: int
    default: 0
"""

    PRIORITY = r"""
options:
  nice:
    description:
      - How much lower than usual the CPU priority is while archives are written or read, V(19) being the lowest.
      - Merges of a running VM are QEMU's work, to which this does not apply.
    type: int
    default: 0
  ionice:
    description:
      - Class of the disk accesses meanwhile, as L(ionice, https://man7.org/linux/man-pages/man1/ionice.1.html) has it.
        V(idle) waits for all others, V(best-effort) is the lowest level of the usual class. If not given, it is not changed.
      - Works where the disk's I/O scheduler knows priorities (C(bfq), C(mq-deadline)).
    type: str
    choices: [best-effort, idle]
"""
