# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the architecture names is there, and imports go down its layers."""

from __future__ import annotations

import re
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils import _notices

UTILS = Path(_notices.__file__).parent
TEXT = (UTILS.parents[1] / "docs" / "ARCHITECTURE.md").read_text()


def test_the_rule_table_names_what_exists() -> None:
    rows = [line.split(" | ")[1] for line in TEXT.partition("| rule | place |")[2].splitlines()[2:]]
    assert len(rows) > 50
    for row in rows:
        places = re.findall(r"`([\w/]+\.py)`(?: \(([^)]*)\))?", row)
        assert places, row
        for name, inside in places:
            path = (UTILS.parent if name.startswith("plugin_utils/") else UTILS) / name
            assert path.is_file(), name
            for word in re.findall(r"`([\w.]+)`", inside):
                assert re.search(rf"\b{word.rpartition('.')[2]}\b", path.read_text()), (name, word)


def test_imports_go_one_way_down() -> None:
    """Of two utils that the layers name, the upper one imports the lower one; but for imports within functions."""
    layers = TEXT.partition("```")[2].partition("```")[0].splitlines()
    floor = {name: number for number, line in enumerate(layers) for name in re.findall(r"\b_[a-z_]+\b", line)}
    for path in UTILS.rglob("*.py"):
        own = path.relative_to(UTILS).parts[0].removesuffix(".py")
        for found in re.finditer(r"(?m)^from .*\.module_utils(?:\.(\w+)| import ([\w, ]+))", path.read_text()):
            for other in re.findall(r"\w+", found.group(1) or found.group(2)):
                assert floor.get(own, 0) <= floor.get(other, 99), f"{path} imports {other}"


def test_every_util_of_the_layers_is_there() -> None:
    named = re.findall(r"\b_[a-z_]+\b", TEXT.partition("```")[2].partition("```")[0])
    assert len(named) == len(set(named)) and {*named} <= {path.stem for path in UTILS.iterdir()}
