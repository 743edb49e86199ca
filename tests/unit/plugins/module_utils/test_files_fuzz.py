# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that this collection keeps, and what a host tells the controller, with anything in them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _json,
    _locks,
    _ofd,
    _paths,
    _settings,
    _slots,
    _vm_state,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive import sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Consistency
from ansible_collections.kvmops.backup.plugins.module_utils._backup.recovery import BackupFacts
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, index, verified
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, JournalError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import monitor
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import retained_layers
from ansible_collections.kvmops.backup.plugins.module_utils._template import digests
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action
from ansible_collections.kvmops.backup.tests.unit.fuzz import ODD, broken_bytes, fuzz, json_values, only_our_errors
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore import restore_values

UUID = restore_values.UUID
NAMES = (
    "frozen", "ended", "begun", "to_merge", "digest", "stat", "version", "key", "points", "lost", "first", "ok", "at", "coverage",
    "format", "evidence", "file", "disk_xml", "host", "boot_id", "pid", "started", "what", "operation", "driver", "filename",
    "phase", "disk", "vm", "percent", "bytes_done", "bytes_total", "rate_bps", "eta_s", "failed", "started", "members", "role",
)  # fmt: skip
GOOD = (
    {"frozen": {"/a": {"digest": "d", "stat": [1, 2, 3, 4, 5]}}, "ended": "", "begun": [5], "to_merge": ["5 x"]},
    {"phase": "copy", "vm": "web", "disk": "vda", "bytes_done": 5, "bytes_total": 9, "percent": 55.5, "rate_bps": 3, "eta_s": 70},
    {"key": "k", "operation": "backup", "holder": {"host": "h", "boot_id": "b", "pid": 1, "started": 1, "what": "w"}},
    [100, 0, "name.tar", "backup of VM web (process 7)"],
    [False, True, False, ["why"], [[5, "web", UUID, "full", "off", 9, True, False, "d", "sha256", ["a"], "a", None, [], None]],
     {"requires": None, "config": {}, "snapshots": [], "warnings": []}],
)


@st.composite
def odd_json(draw: st.DrawFn) -> bytes:
    """JSON of any shape, or one of ours with other values in it; at times broken."""
    value = draw(st.sampled_from(GOOD) | json_values(*NAMES))
    if isinstance(value, dict) and value:
        changes = draw(st.dictionaries(st.sampled_from([str(key) for key in value]), json_values(*NAMES), max_size=3))
        value = {**value, **changes}
    elif isinstance(value, list) and any(value is each for each in GOOD):
        value = [draw(st.just(each) | json_values(*NAMES) | st.sampled_from(("a\0b", "..", -5))) for each in value]
    data = draw(st.just(json.dumps(value).encode()) | st.sampled_from((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9000)))
    return draw(st.just(data) | broken_bytes(data, 2))


@pytest.fixture(scope="module", autouse=True)
def places() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in ("state_dir", "cache_dir", "run_dir"):
            patch.setattr(_paths, name, lambda: directory)
        for name in ("read-only", "trusted-owners"):
            patch.setattr(_paths, name.replace("-", "_") + "_file", lambda name=name: f"{directory}/{name}")
        yield


@fuzz(0.03, odd_json())
def test_fuzz_kept_files(data: bytes) -> None:
    """What is damaged is as good as lost."""
    archive = os.path.join(_paths.state_dir(), "archive")
    Path(archive).write_bytes(b"x")
    points = (restore_values.configuration(consistency=Consistency.OFF),)
    for path in (
        _vm_state._path(UUID), retained_layers._path(UUID, retained_layers.LAYERS), digests._file(archive),
        verified._file((os.stat(archive).st_dev, os.stat(archive).st_ino)),
    ):  # fmt: skip
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)
    line = index.Line("", False, data).view(archive, os.stat(archive))
    if line:
        json.dumps(catalog.entry(line))
    _vm_state.load(UUID).why_ended(5)
    retained_layers.load(UUID)
    digests.cached(archive, "raw")
    verified.last(archive, points)
    lock = Path(_locks._path("vm-x"))
    lock.parent.mkdir(exist_ok=True)
    lock.write_bytes(data)
    with open(lock, "rb") as file:
        str(_locks._owner(file.fileno()))


@fuzz(0.02, st.tuples(st.booleans(), st.lists(odd_json(), max_size=4)))
def test_fuzz_journals(wrote: tuple[bool, list[bytes]]) -> None:
    """A journal ends where it makes no sense. Facts are values, or an error that says so; one without a head is nobody's."""
    has_head, lines = wrote
    dead = Journal.open("vm-1", "backup", BackupFacts({}, UUID, "web"))
    dead.close()
    path = Path(dead.path)
    path.write_bytes((path.read_bytes() if has_head else b"") + b"\n".join(lines))
    found = Journal.peek(lambda _found: True)
    taken = Journal.left_behind(lambda _found: True)
    for each in [*found, *taken]:
        with contextlib.suppress(JournalError):
            each.facts(BackupFacts)
    for each in taken:
        each.close()
    assert [each.head.key for each in found] == (["vm-1"] if has_head else [])
    path.unlink(missing_ok=True)


@fuzz(0.02, st.tuples(odd_json(), odd_json()))
def test_fuzz_slots(records: tuple[bytes, bytes]) -> None:
    """What others at work in a place have told there."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, _slots.NAME)
        path.write_bytes(b"".join(each[:2048].ljust(2048, b"\0") for each in (b"", *records)))
        context = Context(Progress(), lambda _text: None)
        fd = os.open(path, os.O_RDWR)
        try:
            for number in range(1, 3):
                assert _ofd.try_lock(fd, number, 1)
            with only_our_errors(), _slots.hold(directory, 0, what="x", timeout_s=0, context=context) as slot:
                assert slot.others_bytes() >= 0
            with only_our_errors(), _slots.hold(directory, 1, what="x", timeout_s=0, context=context):
                raise AssertionError("two are at work")
        finally:
            os.close(fd)


@fuzz(0.02, st.tuples(odd_json(), odd_json()))
def test_fuzz_status(texts: tuple[bytes, bytes]) -> None:
    """What the controller is told by a host, and by QEMU and the headers of images in JSON."""
    status, result = (each.decode("utf-8", "replace") for each in texts)
    poll = _progress_action.parse_poll(f"\n--x--\n{status}\n--x--\n{result}\n--x--\n", "--x--")
    reporter = _progress_action.Reporter("[host] vm_backup", 0)
    line = reporter.line(poll.status, 100.0) if poll.status else None
    assert line is None or line.isprintable()
    for text in (status, result):
        assert monitor.file_of(f"json:{text}").startswith("/") or not monitor.file_of(f"json:{text}")
        layers.named_file(f"json:{text}")


@fuzz(0.01, st.binary(max_size=300) | st.sampled_from(ODD).map(str.encode))
def test_fuzz_settings_and_notes(data: bytes) -> None:
    archive = os.path.join(_paths.state_dir(), "archive")
    for path in (_paths.read_only_file(), _paths.trusted_owners_file(), archive + sidecars.NOTES):
        Path(path).write_bytes(data)
    for read in (_settings.read_only_places, _settings.trusted_owners, lambda: sidecars.notes(archive)):
        with only_our_errors():
            read()


@pytest.mark.parametrize("text", ["[" * 100_000, "", "\0", "nan5"])
def test_what_is_wrong_with_json_is_one_error(text: str) -> None:
    with pytest.raises(ValueError):
        _json.parse(text)


@pytest.mark.parametrize("value", [True, None, 1.0, "1", float("inf"), 2**64, -(2**64), []])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(ValueError):
        _json.whole(value)
    assert _json.whole(-5) == -5
