# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every real descriptor becomes an archive, with small disks of the right kind instead of its own, or is refused for what it lacks.

The descriptors are other people's, in `../shared/ovf-corpus` beside a checkout or where KVMOPS_OVF_CORPUS says.
"""

from __future__ import annotations

import collections
import gzip
import os
import re
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor, hardware
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.convert import convert
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages

CORPUS = packages.corpus()
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
#: Why descriptors are refused, and how many of the corpus are: docs/OVA.md has this table.
REASONS = {
    "a template with placeholders instead of values": (
        r"is no number|is the property .*, which has no value|two of its items have the InstanceID '#UUID#'|0 bytes of memory", 38,
    ),
    "no well-formed XML": (r"not well-formed", 3),
    "no descriptor, but another document": (r"is no OVF descriptor", 2),
    "no virtual system in it": (r"describes no virtual system", 3),
    "for other architectures, or containers": (r"no PC|not a VM|architecture", 4),
    "delta disks": (r"stands on the disk", 3),
    "a name that is none": (r"is not a name for a VM", 1),
    "a disk whose file the descriptor lacks": (r"names the file .* does not have", 1),
    "files elsewhere": (r"not in the package but somewhere else|lies outside of the package", 3),
}  # fmt: skip
pytestmark = pytest.mark.skipif(CORPUS is None, reason="the corpus of descriptors is not beside this checkout")


def descriptors() -> list[Path]:
    return sorted(path for path in (CORPUS or Path()).iterdir() if path.suffix not in (".md", ".tsv"))


def systems(data: bytes) -> list[str]:
    try:
        found = descriptor.systems(data, "the descriptor")
    except KvmopsError:
        return [""]
    return found if len(found) > 1 else [""]


def test_all_are_parsed_in_seconds() -> None:
    begin = time.monotonic()
    for path in descriptors():
        for system in systems(path.read_bytes()):
            try:
                descriptor.parse(path.read_bytes(), path.name, system=system)
            except KvmopsError:
                continue
    assert time.monotonic() - begin < 5


def package(path: Path, data: bytes, work: Path) -> Path:
    """A directory with the descriptor and small files of the kind that it says."""
    work.mkdir()
    (work / "vm.ovf").write_bytes(data)
    try:
        root = _xml.parse(data, path.name, namespaces=False)
    except KvmopsError:
        return work / "vm.ovf"
    disks = {
        descriptor.attribute(e, "fileRef"): descriptor.attribute(e, "format")
        for e in root.iter()
        if descriptor.local(e) == "Disk"
    }
    for number, element in enumerate(e for e in root.iter() if descriptor.local(e) == "File"):
        href, form = descriptor.attribute(element, "href"), disks.get(descriptor.attribute(element, "id"), "")
        content = packages.content(1 << 20, seed=number, grains=(0, 5))
        image = (
            packages.sparse_vmdk(content)
            if form.endswith("#sparse")
            else packages.stream_vmdk(content)
            if "vmdk" in form
            else content
        )
        if descriptor.attribute(element, "compression") == "gzip":
            image = gzip.compress(image)
        name = unquote(href)
        if "://" in name or ".." in name or not name or len(name) > 200:
            continue
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        chunk = descriptor.attribute(element, "chunkSize")
        if chunk:
            for begin in range(0, len(image), int(chunk)):
                (work / f"{name}.{begin // int(chunk):09}").write_bytes(image[begin : begin + int(chunk)])
        else:
            (work / name).write_bytes(image)
    return work / "vm.ovf"


def test_converted_or_refused_for_a_reason(tmp_path: Path) -> None:
    """No traceback; what is converted is valid, harmless, whole, and the same when it is made again."""
    schema = etree.RelaxNG(etree.parse(str(SCHEMA))) if SCHEMA.exists() else None
    refused: collections.Counter[str] = collections.Counter()
    converted = 0
    for path in descriptors():
        data = path.read_bytes()
        source = package(path, data, tmp_path / path.name)
        for number, system in enumerate(systems(data)):
            target = tmp_path / f"to-{path.name}-{number}"
            target.mkdir()
            request = ConvertRequest(source=str(source), path=str(target), system=system)
            try:
                made = convert(request, Context(Progress(), lambda _text: None))
            except KvmopsError as error:
                assert not os.listdir(target)
                reason = next(
                    (name for name, (pattern, _count) in REASONS.items() if re.search(pattern, str(error))), ""
                )
                refused[reason or f"{path.name}: {error}"] += 1
                continue
            converted += 1
            report = verify_file(made["archive"]["path"])
            assert report.ok and report.coverage == "full", path.name
            described = descriptor.parse(data, path.name, system=system)
            vm = hardware.plan(described, data, path.name, hardware.Options())
            assert not host_exposure.only_allowed(_xml.parse(vm.domain_xml, path.name)).skipped, path.name
            if schema is not None:
                assert schema.validate(etree.fromstring(vm.domain_xml)), (path.name, schema.error_log.last_error)
            assert not convert(request, Context(Progress(), lambda _text: None))["changed"], path.name
    print(converted, dict(refused))
    assert set(refused) <= set(REASONS)
    if len(descriptors()) == 169:
        assert dict(refused) == {name: count for name, (_pattern, count) in REASONS.items() if count}
