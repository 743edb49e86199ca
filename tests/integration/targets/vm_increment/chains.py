# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Points and the truth about them: what the disks were when a point was frozen, and what the archive makes of it."""

from __future__ import annotations

import json
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import chain_of
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run


def frozen_now(vm) -> dict[str, str]:
    """Digest of each disk's content at the point that was just made, read from the frozen files below the VM's overlays."""
    found = {}
    for target, top in vm.disks().items():
        image = json.loads(run("qemu-img", "info", "-U", "--output=json", str(top)))
        below, image_format = image["full-backing-filename"], image["backing-filename-format"]
        found[target] = truth.content_sha256(below, image_format, in_use=True)
    return found


def digests_of_points(archive, directory: Path) -> dict[int, dict[str, str]]:
    """Digest of each disk's content at each point: members taken out with tar and stacked with qemu-img, nothing of ours."""
    run("tar", "-xf", str(archive), "-C", str(directory))
    with open_archive(archive) as reader:
        points = reader.points
    found: dict[int, dict[str, str]] = {}
    for point in points:
        found[point.timestamp] = {}
        for target in sorted({m.target for m in point.members if m.active and m.name.endswith(("qcow2", "snapshot"))}):
            members = chain_of(point, target)
            for member, below in zip(members, members[1:]):
                top, base = str(directory / member.name), str(directory / below.name)
                run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
            found[point.timestamp][target] = truth.content_sha256(directory / members[0].name, "qcow2")
    return found


def layers_bytes(archive, point: int) -> int:
    """Sizes of the members that a point added."""
    with open_archive(archive) as reader:
        by_time = {each.timestamp: each for each in reader.points}
        older = {m.name for time, each in by_time.items() if time < point for m in each.members}
        return sum(m.size_bytes for m in by_time[point].members if m.name not in older)


def chain_lengths(vm) -> dict[str, int]:
    """Number of images that each disk stands on."""
    return {
        target: len(json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", str(path))))
        for target, path in vm.disks().items()
    }


def files_in_guest(directory: Path, archive) -> str:
    """``sha256sum`` lines of all files on the disks at the archive's newest point, as LabVm.frozen_digests() has them.

    ``directory`` is what digests_of_points() has left.
    """
    with open_archive(archive) as reader:
        point = reader.point()
    lines = []
    for target in sorted({m.target for m in point.members if m.active and m.name.endswith(("qcow2", "snapshot"))}):
        raw = truth.to_raw(directory / chain_of(point, target)[0].name, "qcow2", directory / f"{target}.raw")
        inside = directory / f"files-{target}"
        inside.mkdir()
        run("debugfs", "-R", f"rdump / {inside}", str(raw))
        for path in inside.rglob("*"):
            if path.is_file():
                lines.append((f"/disk/{target}/{path.relative_to(inside)}", truth.file_sha256(path)))
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(lines))
