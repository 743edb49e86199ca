# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What all modules share: common options, and the one place where a result or an error becomes Ansible's."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.errors import UnsupportedError

from ansible_collections.kvmops.backup.plugins.module_utils import _deps, _names, _text
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import (
    STOP_SIGNALS,
    Context,
    Progress,
    for_module,
)

URI: dict[str, Any] = {"uri": {"type": "str", "default": "qemu:///system"}}
TARGET: dict[str, Any] = {"pool": {"type": "str"}, "path": {"type": "path"}}
COMPRESSION: dict[str, Any] = {
    "compress_level": {"type": "int", "default": 2},
    "threads": {"type": "int", "default": 0},
}
PRIORITY: dict[str, Any] = {
    "nice": {"type": "int", "default": 0},
    "ionice": {"type": "str", "choices": ["best-effort", "idle"]},
}
# Those that no layer below has told more about.
_LIBVIRT_ERRORS = (connection.libvirt.libvirtError,) if connection.libvirt else ()
_FRAMES_TOLD = 5
Operation = Callable[[Mapping[str, Any], Context], dict[str, Any]]


def run_module(
    argument_spec: Mapping[str, Any],
    operation: Operation,
    *,
    libraries: Iterable[str],
    libraries_for: Mapping[str, str] | None = None,
    **rules: Any,
) -> None:
    """Run `operation(params, context)` as an Ansible module and exit with its result.

    `params` are the module's options with ``check_mode`` and ``diff`` added.
    `libraries` must be there, those in `libraries_for` only where the option that they belong to is given.
    `rules` go to AnsibleModule (``required_one_of`` …).
    A KvmopsError ends the module with ``msg``, ``what``, ``why`` and ``hint``; operating system errors likewise,
    and results with ``failed`` set. Any other exception is a fault of the collection: it is said to be one, and its traceback
    goes where Ansible shows it to those who ask for it.
    A signal that asks the process to end makes the operation stop at its next step, cleaned up.
    What comes out is fit for terminals (_text), and options of type path may name files as they are shown (_names).
    """
    module = AnsibleModule(argument_spec=dict(argument_spec), supports_check_mode=True, **rules)
    needed = [library for option, library in (libraries_for or {}).items() if module.params[option] is not None]
    missing = _deps.first_missing([*libraries, *needed])
    if missing:
        module.fail_json(msg=missing.message, exception=missing.traceback)
    params = {**module.params, "check_mode": module.check_mode, "diff": module._diff}
    result = _outcome(argument_spec, params, operation, for_module, module.warn)
    if result.get("failed"):
        module.fail_json(**result)
    module.exit_json(**result)


def run_within(
    module: str,
    argument_spec: Mapping[str, Any],
    arguments: Mapping[str, Any],
    operation: Operation,
    begin: Callable[[str], Progress],
    *,
    check_mode: bool,
    diff: bool,
    **rules: Any,
) -> dict[str, Any]:
    """What the module of that name would return, its warnings as text; for a process that another module has forked for it.

    Operation and rules are those of run_module; `begin` gives the progress for a VM. The libraries are there.
    """
    checked = ArgumentSpecValidator(dict(argument_spec), **rules).validate(dict(arguments))
    if checked.error_messages:
        unsupported = isinstance(checked.errors[0], UnsupportedError)
        prefix = f"Unsupported parameters for ({module}) module: " if unsupported else ""
        return {"failed": True, "changed": False, "msg": f"{prefix}{checked.errors.msg}", "warnings": []}
    params = {**checked.validated_parameters, "check_mode": check_mode, "diff": diff}
    warnings: list[str] = []
    return {**_outcome(argument_spec, params, operation, begin, warnings.append), "warnings": warnings}


def _outcome(
    argument_spec: Mapping[str, Any],
    params: dict[str, Any],
    operation: Operation,
    begin: Callable[[str], Progress],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The result of an operation, whatever becomes of it."""
    told: set[str] = set()

    def warn(notice: Notice) -> None:
        text = _text.printable(notice.text)
        if text not in told:
            told.add(text)
            tell(text)

    progress = Progress()
    context = Context(progress, warn)
    try:
        progress = begin(params.get("vm") or "")
        for number in STOP_SIGNALS:
            signal.signal(number, lambda received, frame: progress.cancel(f"signal {signal.Signals(received).name}"))
        _check_compression(params)
        paths = (option for option, spec in argument_spec.items() if spec.get("type") == "path" and params[option])
        params.update({option: _names.meant(params[option]) for option in paths})
        context = Context(progress, warn)
        result = operation(params, context)
    except KvmopsError as error:
        result = error.result()
    except _LIBVIRT_ERRORS as error:
        result = connection.translate(error, f"libvirt at {params.get('uri', '')}").result()
    except OSError as error:
        hint = "Check the storage under it: the host's log (dmesg) says more." if error.errno == errno.EIO else ""
        result = KvmopsError(str(error.filename or "A file operation"), error.strerror or str(error), hint).result()
    except MemoryError:
        hint = "Free memory, or raise the process's limit (ulimit, cgroup), and run the task again: it puts right what is left."
        result = KvmopsError("The operation", "there is not enough memory for it on this host", hint).result()
    except Exception as error:
        result = {**_fault(error).result(), "exception": traceback.format_exc()}
    finally:
        progress.close()
    result["changed"] = bool(result.get("changed") or context.settled)
    shown: dict[str, Any] = _text.all_shown(result)
    return shown


def _fault(error: Exception) -> KvmopsError:
    """What a person is told about a fault of ours."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:])
    where = ", called from ".join(f"{os.path.basename(frame.filename)} line {frame.lineno}" for frame in frames)
    return KvmopsError(
        "A fault of this collection",
        f"{type(error).__name__} ({error}) in {where}",
        "Run the task again: it puts right what this run has left. Please report the fault, with its traceback "
        "(ANSIBLE_DISPLAY_TRACEBACK=error; up to ansible-core 2.18: -vvv).",
    )


def _check_compression(params: Mapping[str, Any]) -> None:
    level, threads = params.get("compress_level", 1), params.get("threads", 0)
    if not 1 <= level <= 19:
        raise RefusedError("Option compress_level", f"{level} is no level", "Use 1 (fastest) to 19 (smallest).")
    if threads < 0:
        raise RefusedError("Option threads", f"{threads} is no number of threads", "Use 0 for one per core.")
