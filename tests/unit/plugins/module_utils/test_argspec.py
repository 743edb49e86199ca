# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From arguments to requests, from results and errors to what Ansible sees."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml
from ansible.module_utils import basic

from ansible_collections.kvmops.backup.plugins.module_utils import _argspec, _deps, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._backup import request as backup_request
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import (
    ChangeRequest,
    InfoRequest,
    Selection,
    VerifyRequest,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import request as restore_request

MODULES = Path(_argspec.__file__).parents[1] / "modules"
SPEC = {"vm": {"type": "str"}, "query": {"type": "str"}}


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "run_dir", lambda: str(tmp_path))


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the module; Ansible's own collection of them is global."""
    texts: list[str] = []
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda _module, text: texts.append(text))
    return texts


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    operation: Callable[[Mapping[str, Any], Context], dict[str, Any]],
    arguments: Mapping[str, Any] | None = None,
    **rules: Any,
) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a module with that operation."""
    handlers = {number: signal.getsignal(number) for number in _argspec.STOP_SIGNALS}
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": dict(arguments or {})}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    try:
        with pytest.raises(SystemExit) as ended:
            _argspec.run_module(SPEC, operation, libraries=[], **rules)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = ended.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("numbers", [{"compress_level": 0}, {"compress_level": 20}, {"threads": -1}])
def test_numbers_that_compression_does_not_know_end_before_anything_is_done(
    numbers: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[object] = []
    spec = {**SPEC, **_argspec.COMPRESSION}
    monkeypatch.setattr(sys.modules[__name__], "SPEC", spec)
    code, result = run(monkeypatch, capsys, lambda params, _context: done.append(params) or {}, numbers)
    assert code == 1 and not done
    assert (result["what"], result["hint"][:3]) == (f"Option {next(iter(numbers))}", "Use")


def test_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warned: list[str]) -> None:
    seen = {}

    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        seen.update(params)
        context.warn(Notice(Code.REMOVED, "once"))
        context.warn(Notice(Code.REMOVED, "once"))
        context.warn(Notice(Code.REMOVED, "twice"))
        return {"archives": [1]}

    code, result = run(
        monkeypatch, capsys, operation, {"vm": "web01", "_ansible_check_mode": True, "_ansible_diff": True}
    )
    assert (code, result["changed"], result["archives"]) == (0, False, [1])
    assert warned == ["once", "twice"]
    assert seen == {"vm": "web01", "query": None, "check_mode": True, "diff": True}


def test_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, warned: list[str]
) -> None:
    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        context.warn(Notice(Code.REMOVED, "degraded"))
        context.progress.phase("copy")
        raise RefusedError("The VM web01", "it has a managed-save image", "Start it first.")

    code, result = run(monkeypatch, capsys, operation)
    assert code == 1
    assert result["msg"] == "The VM web01: it has a managed-save image. Start it first."
    assert (result["what"], result["why"], result["hint"]) == (
        "The VM web01", "it has a managed-save image", "Start it first.",
    )  # fmt: skip
    assert (result["failed"], result["cancelled"], warned) == (True, False, ["degraded"])
    assert list((tmp_path / "status").iterdir()) == []


def test_system_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(monkeypatch, capsys, lambda _params, _context: {"size": os.stat("/no/such/file").st_size})
    assert (code, result["msg"]) == (1, "/no/such/file: No such file or directory")


def test_no_memory_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def operation(params: Mapping[str, Any], _context: Context) -> dict[str, Any]:
        raise MemoryError

    code, result = run(monkeypatch, capsys, operation)
    assert code == 1 and "not enough memory" in result["why"] and "fault" not in result["msg"] and "exception" not in result


def test_a_fault_of_ours_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    fail_json = basic.AnsibleModule.fail_json
    monkeypatch.setattr(
        basic.AnsibleModule, "fail_json", lambda module, **result: given.update(result) or fail_json(module, **result)
    )
    code, result = run(monkeypatch, capsys, lambda params, _context: {"x": params["missing"]})
    assert (code, result["failed"], result["cancelled"]) == (1, True, False)
    assert result["msg"].startswith("A fault of this collection: KeyError ('missing') in test_argspec.py line ")
    assert "called from _argspec.py line " in result["msg"]
    assert "Traceback" not in result["msg"] and "report" in result["hint"]
    assert given["exception"].startswith("Traceback ") and "KeyError: 'missing'" in given["exception"]


def test_a_fault_before_the_operation_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_paths, "run_dir", lambda: "/proc/no/such")
    code, result = run(monkeypatch, capsys, lambda _params, _context: {})
    assert (code, result["msg"]) == (1, "/proc/no: No such file or directory")


def test_what_others_wrote_reaches_no_terminal_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warned: list[str]
) -> None:
    foreign = "\x1b]0;owned\x07\x9b2J\u202egnp\nok: [localhost]" + "x" * 100_000

    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        context.warn(Notice(Code.GUEST_STOPPED, f"the guest says {foreign}"))
        raise RefusedError(f"The VM {foreign}", foreign, foreign)

    _code, result = run(monkeypatch, capsys, operation)
    for text in (*warned, *(result[key] for key in ("msg", "what", "why", "hint"))):
        assert text.isprintable() and len(text) < 10_000 and "more characters" in text
    assert result["why"].startswith("%1B]0;owned%07%C2%9B2J%E2%80%AEgnp ok: [localhost]xxx")


def test_no_text_in_a_result_is_endless(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"notes": "n" * 65_536, "archives": [{"warnings": ["x" * 4_000_000]}]}
    _code, result = run(monkeypatch, capsys, lambda _params, _context: answer)
    assert result["notes"] == answer["notes"]
    assert result["archives"][0]["warnings"] == ["x" * 100_000 + " ... (3900000 more characters)"]


def test_a_failed_result_keeps_its_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"failed": True, "msg": "Damaged: a.tar", "archives": [{"ok": False}]}
    code, result = run(monkeypatch, capsys, lambda _params, _context: answer)
    assert (code, result["failed"], result["msg"], result["archives"]) == (1, True, "Damaged: a.tar", [{"ok": False}])


def test_libvirt_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed here")

    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        raise libvirt.libvirtError("no reason")

    code, result = run(monkeypatch, capsys, operation)
    assert (code, "no reason" in result["msg"]) == (1, True)


@pytest.mark.parametrize("number", _argspec.STOP_SIGNALS)
def test_a_signal_stops_it_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    cleaned_up = []

    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), number)
            while True:
                context.progress.advance(1)
        finally:
            cleaned_up.append(True)

    code, result = run(monkeypatch, capsys, operation)
    assert (code, result["cancelled"], cleaned_up) == (1, True, [True])
    assert number.name in result["msg"]


def test_a_module_within_another_returns_what_it_would_have_printed() -> None:
    """The same checks, conversions and errors, and its own warnings."""
    seen: dict[str, Any] = {}

    def operation(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
        seen.update(params)
        context.warn(Notice(Code.SPACE, "tight\n"))
        if params["vm"] == "lost":
            raise RefusedError("The VM lost", "it is not there", "Look for it.")
        return {"changed": 1, "notes": ("a", "\x1b")}

    def within(**arguments: Any) -> dict[str, Any]:
        spec = {**SPEC, "count": {"type": "int", "default": 3}}
        handlers = {number: signal.getsignal(number) for number in _argspec.STOP_SIGNALS}
        try:
            return _argspec.run_within(
                "kvmops.backup.other", spec, arguments, operation, lambda _vm: Progress(), check_mode=True, diff=False,
                required_one_of=[["vm", "query"]],
            )  # fmt: skip
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    assert within(vm="web01", count="7") == {"changed": True, "notes": ["a", "%1B"], "warnings": ["tight"]}
    assert seen == {"vm": "web01", "query": None, "count": 7, "check_mode": True, "diff": False}
    lost = within(vm="lost")
    assert (lost["failed"], lost["msg"], lost["warnings"]) == (True, "The VM lost: it is not there. Look for it.", ["tight"])
    seen.clear()
    for wrong, text in (
        ({"vm": "a", "other": 1}, "Unsupported parameters for (kvmops.backup.other) module: other. Supported parameters"),
        ({"vm": "a", "count": "many"}, "argument 'count' is of type"),
        ({}, "one of the following is required: vm, query"),
    ):
        result = within(**wrong)
        assert result["failed"] and result["changed"] is False and result["msg"].startswith(text), result
    assert not seen


def test_a_missing_library_is_named_with_its_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jmespath", None)
    never = {"never": True}
    code, result = run(monkeypatch, capsys, lambda _params, _context: never, libraries_for={"query": "jmespath"})
    assert (code, result["never"]) == (0, True)
    code, result = run(
        monkeypatch, capsys, lambda _params, _context: never, {"query": "x"}, libraries_for={"query": "jmespath"}
    )
    assert code == 1 and "never" not in result
    assert "jmespath" in result["msg"] and "python3-jmespath" in result["msg"]


def test_every_library_has_its_packages() -> None:
    assert _deps.first_missing(["json"]) is None
    assert set(_deps.LIBRARIES) == {"libvirt", "lxml", "zstandard", "jmespath"}


def params_of(module: str, **given: Any) -> dict[str, Any]:
    """What AnsibleModule would make of the given options."""
    spec = importlib.import_module(f"ansible_collections.kvmops.backup.plugins.modules.{module}").ARGUMENT_SPEC
    return {
        **{name: option.get("default") for name, option in spec.items()},
        "check_mode": False,
        "diff": False,
        **given,
    }


# What Ansible makes something of itself: a result with `skipped` is that of a task which was not run.
ANSIBLES_OWN = {"skipped", "unreachable", "results", "rc", "stdout", "stderr", "exception", "invocation", "deprecations"}


@pytest.mark.parametrize("module", [path.stem for path in MODULES.glob("*.py")])
def test_no_result_has_a_key_that_means_something_to_ansible(module: str) -> None:
    documented = importlib.import_module(f"ansible_collections.kvmops.backup.plugins.modules.{module}").RETURN
    assert not ANSIBLES_OWN & set(yaml.safe_load(documented))


def test_the_defaults_of_modules_and_requests_are_the_same() -> None:
    backup = backup_request.from_params(params_of("vm_backup", vm="web01", pool="backups"))
    assert backup == backup_request.BackupRequest("web01", pool="backups")
    restore = restore_request.from_params(params_of("vm_restore", source="/b/x.tar"))
    assert restore == restore_request.RestoreRequest("/b/x.tar")
    assert InfoRequest.of(params_of("backup_info")) == InfoRequest(Selection())
    assert VerifyRequest.of(params_of("backup_verify", path="/b")) == VerifyRequest(Selection(path="/b"))
    assert ChangeRequest.of(params_of("backup_archive", archive="/b/x.tar")) == ChangeRequest("/b/x.tar")
    assert ConvertRequest.of(params_of("ova_convert", src="/b/x.ova")) == ConvertRequest("/b/x.ova")


def test_options_reach_their_field() -> None:
    backup = backup_request.from_params(
        params_of(
            "vm_backup",
            vm="web01",
            path="/b",
            uri="qemu:///session",
            mode="incremental",
            incrementable=True,
            archive="/b/a.tar",
            increment_limit=7,
            increment_limit_deletes="own",
            compress=True,
            compress_level=9,
            threads=3,
            consistency="crash",
            include_iso=False,
            include_boot_files=False,
            include_secrets=True,
            max_age="20h",
            keep_last=3,
            keep_days=30,
            free_space=True,
            max_parallel=2,
            wait_timeout="30m",
            bandwidth="50M",
            notes="n",
            check_mode=True,
            diff=True,
        )
    )
    assert backup == backup_request.BackupRequest(
        vm="web01", path="/b", uri="qemu:///session", mode=backup_request.Mode.INCREMENTAL, incrementable=True,
        archive="/b/a.tar", increment_limit=7, increment_limit_deletes=backup_request.Deletes.OWN,
        compress=True, compress_level=9, threads=3,
        consistency=backup_request.ConsistencyWish.CRASH, include_iso=False, include_boot_files=False,
        include_secrets=True, max_age_s=72000,
        keep_last=3, keep_days=30, free_space=True, max_parallel=2, wait_timeout_s=1800, slot_timeout_s=1800,
        bandwidth_bps=50 * 2**20, notes="n", check_mode=True, diff=True,
    )  # fmt: skip
    auto = backup_request.from_params(params_of("vm_backup", vm="a", path="/b", mode="auto", full_weekday="sunday"))
    assert auto.incrementable
    assert auto.full_weekday == "sunday"
    contradictory: list[dict[str, Any]] = [
        {"archive": "/b/a.tar"},
        {"increment_limit": -1},
        {"mode": "incremental", "increment_limit": 1},
        {"mode": "incremental", "full_weekday": "sunday"},
    ]
    for wrong in contradictory:
        with pytest.raises(RefusedError):
            backup_request.from_params(params_of("vm_backup", vm="web01", path="/b", **wrong))
    for nothing in ({"path": ""}, {"pool": ""}, {"mode": "auto", "archive": ""}):
        with pytest.raises(RefusedError, match="are empty"):
            backup_request.from_params(params_of("vm_backup", vm="web01", **nothing))
    with pytest.raises(RefusedError, match="are empty"):
        VerifyRequest.of(params_of("backup_verify", archive=""))
    with pytest.raises(RefusedError, match="max_age"):
        backup_request.from_params(params_of("vm_backup", vm="web01", path="/b", max_age="soon"))
    restore = restore_request.from_params(
        params_of(
            "vm_restore",
            source="/b/x.tar",
            point=5,
            path="/i",
            name="n",
            uuid="new",
            mac="keep",
            networks={"a": "b"},
            disk_images={"vda": "b.img", "vdb": None},
            disks=False,
            system="s",
            configuration="c",
            disk_format="qcow2",
            start=True,
            force=True,
            repair=True,
            uri="qemu:///session",
            check_mode=True,
            diff=True,
        )
    )
    assert restore == restore_request.RestoreRequest(
        "/b/x.tar", 5, "", "/i", "n", "new", "keep", {"a": "b"}, restore_request.DiskFormat.QCOW2, False, True, True,
        "qemu:///session", True, True, {"vda": "b.img", "vdb": ""}, True, disks=False, system="s", configuration="c",
    )  # fmt: skip
    options = {"name": "n", "system": "s", "configuration": "c", "disk_bus": "virtio", "nic_model": "e1000", "firmware": "efi"}
    others = {"machine": "pc", "compress": True, "compress_level": 9, "threads": 3, "networks": {"a": "b"}, "path": "/b"}
    convert = ConvertRequest.of(params_of("ova_convert", src="/b/x.ova", **options, **others))
    assert convert == ConvertRequest("/b/x.ova", **options, **others)
    found = ChangeRequest.of(
        params_of("backup_archive", archive="/b/x.tar", state="absent", compressed=False, notes="")
    )
    assert found == replace(ChangeRequest("/b/x.tar"), present=False, compressed=False, notes="")
