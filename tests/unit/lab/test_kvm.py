# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A KVM that does not work is told from one that does (that one is asked on a whole host, tests/host)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab import kvm


def test_what_is_not_there_or_is_no_kvm_does_not_work(tmp_path: Path) -> None:
    assert not kvm.kvm_works(str(tmp_path / "kvm"))
    assert not kvm.kvm_works("/dev/null")


def test_a_processor_that_is_far_too_slow_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text("import time\nprint('about to run', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(kvm, "__file__", str(trial))
    begin = time.monotonic()
    assert not kvm.kvm_works("/dev/null", timeout_s=0.2)
    assert time.monotonic() - begin < 30


def test_a_trial_that_ends_well_means_that_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text("import sys\nsys.exit(sys.argv[1:] != ['/dev/null'])\n")
    monkeypatch.setattr(kvm, "__file__", str(trial))
    assert kvm.kvm_works("/dev/null")
