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
      - Level 2 is 1.6 times as fast as level 3, and its output is 2 percent larger.
    type: int
    default: 2
  threads:
    description:
      - Number of threads that compress and compute digests; V(0) means one per core.
    type: int
    default: 0
"""

    PRIORITY = r"""
options:
  nice:
    description:
      - How much to lower the CPU priority while archives are written or read. V(19) is the lowest priority.
      - This does not apply to merges of a running VM, which QEMU does.
    type: int
    default: 0
  ionice:
    description:
      - Class of the disk accesses meanwhile, as in L(ionice, https://man7.org/linux/man-pages/man1/ionice.1.html).
        V(idle) waits for all other accesses. V(best-effort) is the lowest level of the usual class. If not given, the class
        does not change.
      - Only effective if the disk's I/O scheduler supports priorities (C(bfq), C(mq-deadline)).
    type: str
    choices: [best-effort, idle]
"""
