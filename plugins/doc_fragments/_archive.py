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
