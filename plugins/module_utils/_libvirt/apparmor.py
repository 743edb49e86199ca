# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What AppArmor's profile of a running VM denies a merge, and how that is lifted for just the files that the merge writes to.

libvirt before 12.1 writes ``deny "<path>" w,`` for every backing file into ``/etc/apparmor.d/libvirt/libvirt-<uuid>.files``, at the
VM's start and each time it makes the file anew. When a commit starts it appends ``"<path>" rwk,``, but a denial wins, silently.
Source: vah_add_path() in libvirt's virt-aa-helper.c, the same in 9.0 and 11.3: resolved paths in double quotes, with nothing
escaped; files with a double quote in their names it does not serve at all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from contextlib import suppress

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain, libvirt, translate

_DIRECTORY = "/etc/apparmor.d/libvirt"
_PARSER = "apparmor_parser"
_SBIN = "/usr/sbin:/sbin"  # not in every user's PATH
_TIMEOUT_S = 120.0
_DENIAL = re.compile(r'\s*deny "([^"]*)" w,\s*')


def security_model(xml: str) -> str:
    """The security driver that confines a running VM: "apparmor", "selinux", "" for none. Pure; `xml` is the live definition."""
    root = _xml.parse(xml, "The domain XML")
    models = {label.get("model", "") for label in root.iterfind("seclabel") if label.findtext("label")}
    return next((model for model in ("apparmor", "selinux") if model in models), "")


def denied(rules: str, paths: Collection[str]) -> tuple[str, ...]:
    """Which of the (resolved) paths these rules deny to be written to. Pure."""
    found = {match[1] for match in map(_DENIAL.fullmatch, rules.splitlines()) if match}
    return tuple(path for path in paths if path in found)


def without_denials(rules: str, paths: Collection[str]) -> str:
    """The rules without the denials of just these (resolved) paths. Pure."""
    return "".join(line for line in rules.splitlines(keepends=True) if not denied(line, paths))


def require_mergeable(domain: Domain, paths: Collection[str]) -> None:
    """For the files that a merge writes to, all of them the VM's own. Raises RefusedError for what lift() could not do."""
    file, rules = _rules_of(domain)
    found = denied(rules, _resolved(paths))
    if found:
        _require_tools(domain, file, found)


def lift(domain: Domain, paths: Collection[str]) -> bool:
    """Take the denials of these files, all of them the VM's own, out of its profile; False, and nothing done, if there is none.

    libvirt makes them anew when it makes the file anew. Raises RefusedError where that cannot be done, KvmopsError where it failed;
    the profile is as it was then.
    """
    file, rules = _rules_of(domain)
    found = denied(rules, _resolved(paths))
    if not found:
        return False
    parser = _require_tools(domain, file, found)
    failed = _change(parser, file, without_denials(rules, found))
    if failed:
        _change(parser, file, rules)
        raise KvmopsError(f"AppArmor's profile of {domain.name()}", failed, _ways_out(domain, file, found))
    return True


def explain(domain: Domain, error: KvmopsError, path: str) -> KvmopsError:
    """The error with the name of the security driver that is behind it, and the ways out; the same one for any other error."""
    if "Permission denied" not in error.why:
        return error
    try:
        model = security_model(domain.XMLDesc(0))
    except libvirt.libvirtError:
        return error
    if model == "apparmor":
        return KvmopsError(
            error.what,
            f"{error.why} (AppArmor confines the VM and may deny {path})",
            _ways_out(domain, _file_of(domain), [os.path.realpath(path)]),
        )
    if model == "selinux":
        return KvmopsError(
            error.what,
            f"{error.why} (SELinux confines the VM and may deny {path})",
            f"Power the VM off and run the task again: then the merge is not confined. Or see what was denied, and allow it: "
            f"ausearch -m avc -ts recent; restorecon -v '{path}'",
        )
    return error


def _rules_of(domain: Domain) -> tuple[str, str]:
    """The file with the rules that libvirt makes for this very VM, and what it says now; "" where there is none to be read."""
    try:
        confined = security_model(domain.XMLDesc(0)) == "apparmor"
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {domain.name()}") from error
    file = _file_of(domain)
    if confined:
        with suppress(OSError), open(file, encoding="utf-8", errors="surrogateescape") as stream:
            return file, stream.read()
    return file, ""


def _file_of(domain: Domain) -> str:
    return os.path.join(_DIRECTORY, f"libvirt-{domain.UUIDString()}.files")


def _profile_of(file: str) -> str:
    return file[: -len(".files")]


def _resolved(paths: Collection[str]) -> list[str]:
    return [os.path.realpath(path) for path in paths]


def _require_tools(domain: Domain, file: str, found: Collection[str]) -> str:
    """Path of apparmor_parser. Raises RefusedError."""
    parser = shutil.which(_PARSER, path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    lack = "" if parser else f"{_PARSER} is not installed here"
    if os.geteuid() or not os.access(_DIRECTORY, os.W_OK):
        lack = f"this user may not change {file}"
    if lack or not parser:
        raise RefusedError(
            f"The VM {domain.name()}",
            f"AppArmor denies its QEMU to write to {', '.join(found)}, into which snapshots are to be merged, and {lack}",
            _ways_out(domain, file, found),
        )
    return parser


def _ways_out(domain: Domain, file: str, found: Collection[str]) -> str:
    expressions = " ".join(f"-e '\\|deny \"{path}\" w,|d'" for path in found)
    return (
        f"Power {domain.name()} off and run the task again: then the merge is not confined. Or, as root, while it runs: "
        f"sed -i {expressions} {file} && {_PARSER} -r {_profile_of(file)}"
    )


def _change(parser: str, file: str, rules: str) -> str:
    """Why the profile could not be changed, "" if it was."""
    try:
        _replace(file, rules)
    except (OSError, TargetError) as error:
        return f"{file} cannot be replaced: {error}"
    return _load(parser, _profile_of(file))


def _replace(file: str, rules: str) -> None:
    """As a whole, for the same owner; nothing in that directory is loaded by its name."""
    fresh = f"{file}.kvmops"
    before = os.stat(file)
    with suppress(FileNotFoundError):
        os.unlink(fresh)
    fd = _files.create(fresh)
    try:
        os.fchown(fd, before.st_uid, before.st_gid)
        os.fchmod(fd, before.st_mode & 0o7777)
        _files.write_all(fd, rules.encode("utf-8", "surrogateescape"), 0, fresh)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(fresh, file)
    _files.sync_directory(os.path.dirname(file))


def _load(parser: str, profile: str) -> str:
    """Why the profile could not be loaded, "" if it was."""
    try:
        done = subprocess.run(
            [parser, "-r", profile],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{parser} failed: {error}"
    return "" if done.returncode == 0 else f"{parser} failed: {done.stderr.strip() or f'exit code {done.returncode}'}"
