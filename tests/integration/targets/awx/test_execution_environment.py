# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-builder takes what the collection says it needs, and the definition of an environment with the collection."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from ansible_collections.kvmops.backup.tests.lab._run import run

TOP = Path(__file__).resolve().parents[4]
BUILDER = Path(sys.executable).parent / "ansible-builder"


@pytest.fixture(autouse=True)
def _installed() -> None:
    if not BUILDER.exists():
        pytest.skip("ansible-builder is not installed here")


def test_what_the_collection_needs_is_found() -> None:
    told = run(str(BUILDER), "introspect", os.environ["ANSIBLE_COLLECTIONS_PATH"])
    found = yaml.safe_load(told[told.index("---") :] if "---" in told else told)
    python = (
        {requirement for each in found["python"].values() for requirement in each}
        if isinstance(found["python"], dict)
        else {str(each).split()[0] for each in found["python"]}
    )
    assert {"jmespath", "lxml", "zstandard"} <= {each.strip() for each in python}
    assert "openssh-client" in str(found["system"])


def test_a_build_context_can_be_made(tmp_path: Path) -> None:
    run(str(BUILDER), "create", "-f", str(TOP / "ee" / "execution-environment.yml"), "-c", str(tmp_path / "context"))
    requirements = yaml.safe_load((tmp_path / "context" / "_build" / "requirements.yml").read_text(encoding="utf-8"))
    assert requirements == {"collections": [{"name": "kvmops.backup"}]}
    recipe = next(tmp_path.glob("context/*ile")).read_text(encoding="utf-8")  # Dockerfile or Containerfile
    assert "ansible-core>=2.17,<2.20" in recipe
