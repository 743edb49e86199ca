# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The archive layer as commands, so that it can be measured beside tar, zstd and qemu-img, a process started on both sides.

pack DISK XML ARCHIVE [LEVEL] | pack-raw DISK XML ARCHIVE | append ARCHIVE LAYER XML |
restore ARCHIVE DIRECTORY | verify ARCHIVE | view ARCHIVE | list ARCHIVE | convert OVA DIRECTORY [LEVEL]
"""

from __future__ import annotations

import os
import sys

_UUID = "9a3e7c52-5b0e-4d0c-8f55-6b8a4c1d2e3f"
_TIMESTAMP = 1795309200


def _pack(disk: str, xml: str, archive: str, level: int = 0, raw: bool = False) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter, Compression
    from ansible_collections.kvmops.backup.plugins.module_utils._image.source import FileSource, RawAsQcow2Source

    source = RawAsQcow2Source(disk) if raw else FileSource(disk)
    member = Member("vda_0.qcow2", Role.DISK, source.size_bytes, target="vda", image_format="qcow2", active=True)
    directory, name = os.path.split(archive)
    compression = Compression(level) if level else None
    with ArchiveWriter(directory, name, compression=compression, timestamp=_TIMESTAMP) as writer:
        stored = writer.add(member, source)
        with open(xml, encoding="utf-8") as file:
            writer.publish(Configuration(_TIMESTAMP, file.read(), "benchmark", _UUID, (stored,)))
    source.close()


def _append(archive: str, layer: str, xml: str) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.append import ArchiveAppender
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
    from ansible_collections.kvmops.backup.plugins.module_utils._image.source import FileSource

    source = FileSource(layer)
    with ArchiveAppender(archive, timestamp=_TIMESTAMP + 86400, sizes=[source.size_bytes]) as appender:
        old = appender.newest.members
        parent = old[-1].name
        member = Member("vda_1.snapshot", Role.LAYER, 0, target="vda", image_format="qcow2", parent=parent, active=True)
        stored = appender.add(member, source)
        with open(xml, encoding="utf-8") as file:
            appender.publish(Configuration(_TIMESTAMP + 86400, file.read(), "benchmark", _UUID, (*old, stored)))
    source.close()


def _restore(archive: str, directory: str) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils import _files
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
    from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import FileSink

    with open_archive(archive) as reader:
        wanted = []
        for member in reader.point().members:
            target = _files.create(os.path.join(directory, member.name))
            wanted.append((member, FileSink(target, member.size_bytes)))
        reader.extract(wanted)
        for _member, sink in wanted:
            sink.close()
    _files.sync_directory(directory)


def _verify(archive: str) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file

    report = verify_file(archive)
    if not report.ok or report.coverage != "full":
        sys.exit(f"{archive}: {report}")


def _view(archive: str) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive

    with open_archive(archive) as reader:
        print(reader.point().domain_xml)


def _list(archive: str) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive

    with open_archive(archive) as reader:
        for point in reader.points:
            for member in point.members:
                print(point.timestamp, member.name, member.size_bytes, member.digest)


def _convert(ova: str, directory: str, level: int = 0) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._ovf.convert import convert
    from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
    from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress

    request = ConvertRequest(ova, path=directory, compress=bool(level), compress_level=level or 2)
    print(convert(request, Context(Progress(), lambda _text: None))["archive"]["path"])


def main(verb: str, *arguments: str) -> None:
    """Runs one command."""
    if verb == "pack":
        disk, xml, archive, *level = arguments
        _pack(disk, xml, archive, level=int(level[0]) if level else 0)
    elif verb == "pack-raw":
        disk, xml, archive = arguments
        _pack(disk, xml, archive, raw=True)
    elif verb == "append":
        archive, layer, xml = arguments
        _append(archive, layer, xml)
    elif verb == "convert":
        ova, directory, *level = arguments
        _convert(ova, directory, int(level[0]) if level else 0)
    elif verb == "restore":
        archive, directory = arguments
        _restore(archive, directory)
    else:
        (archive,) = arguments
        {"verify": _verify, "view": _view, "list": _list}[verb](archive)


if __name__ == "__main__":
    main(*sys.argv[1:])
