# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives that other tools made, and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, make_iso

Run = Callable[..., ModuleResult]


def unpacked(lab: Lab, name: str) -> tuple[Path, dict[str, str]]:
    """A directory with the disks and the definition of a VM that is gone, and the digests of the disks' content."""
    vm = lab.create_vm(name, [Disk(), Disk()], start=False)
    folder = lab.path("foreign")
    (folder / "web.xml").write_text(vm.xml(inactive=True))
    digests = {}
    for target, path in vm.disks().items():
        digests[target] = truth.content_sha256(path, "qcow2")
        path.rename(folder / path.name)
    vm.remove()
    return folder, digests


PACKERS = {
    "plain": ["tar", "-V", "made on monday", "-cf", "{archive}.tar", "-C", "{folder}", "web.xml", "vda.qcow2", "vdb.qcow2"],
    "dot": ["tar", "-C", "{folder}", "-cf", "{archive}.tar", "."],
    "zstd": ["sh", "-c", "tar -C '{folder}' -cf - . | zstd -q -19 --long -o '{archive}.tar.zst'"],
}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_foreign_archive_is_restored(lab: Lab, run_module: Run, packer: str) -> None:
    folder, digests = unpacked(lab, "stranger")
    run(*(part.format(archive=lab.directory / "x", folder=folder) for part in PACKERS[packer]))
    archive = next(lab.directory.glob("x.tar*"))
    # trusted, as the guests of the lab boot a kernel of the host
    wishes = {"source": str(archive), "name": "restored here", "trust": True}
    done = run_module("vm_restore", path=str(lab.path("restored")), **wishes)
    vm = lab.adopt("restored here")
    assert done.changed and {t: truth.content_sha256(path, "qcow2") for t, path in vm.disks().items()} == digests
    assert not run_module("vm_restore", path=str(lab.directory / "restored"), **wishes).changed
    # to the former places, which still are there
    back = run_module("vm_restore", source=str(archive), trust=True)
    assert {disk["path"] for disk in back["disks"]} == {
        str(lab.directory / f"vm-0/{target}.qcow2") for target in digests
    }
    assert lab.adopt("stranger").domain.name() == "stranger"
    vm.start()


def test_images_with_names_of_another_tool_go_to_their_disks(lab: Lab, run_module: Run) -> None:
    """Sorted by name they would be crossed. Where no name tells, the user says it, and until then nothing is touched."""
    vm = lab.create_vm("web01", [Disk(ext4=False, size_mib=32), Disk("raw", ext4=False, size_mib=32)], start=False)
    folder, definition, contents = lab.path("foreign"), vm.xml(inactive=True), {}
    for number, (target, path) in enumerate(vm.disks().items()):
        image_format = "raw" if path.suffix == ".raw" else "qcow2"
        run("qemu-io", "-f", image_format, "-c", f"write -P {number + 1} 1M 2M", str(path))
        contents[target] = truth.content_sha256(path, image_format)
        renamed = "web01" if target == "vda" else "data"
        definition = definition.replace(path.name, f"{renamed}{path.suffix}")
        run("qemu-img", "convert", "-f", image_format, "-O", "qcow2", str(path), str(folder / f"b-{renamed}.qcow2"))
    vm.remove()
    (folder / "1700000000_web01.xml").write_text(definition)
    source, place = str(lab.directory / "x.tar"), str(lab.path("restored"))

    def restored(name: str, **options: object) -> dict[str, str]:
        run_module("vm_restore", source=source, name=name, path=place, **options)
        found = lab.adopt(name).disks()
        return {t: truth.content_sha256(path, "raw" if t == "vdb" else "qcow2") for t, path in found.items()}

    run("tar", "-C", str(folder), "-cf", source, ".")
    assert restored("told by names") == contents
    for number, name in enumerate(("data", "web01")):
        (folder / f"b-{name}.qcow2").rename(folder / f"disk-{number}.qcow2")
    run("tar", "-C", str(folder), "-cf", source, ".")
    refused = run_module("vm_restore", source=source, name="refused", path=place, fails=True)
    for text in ("vda (", "vdb (", "disk-0.qcow2 (qcow2, 32.0 MiB)", "disk-1.qcow2 (qcow2, 32.0 MiB)"):
        assert text in refused["why"], refused.message
    assert "disk_images: {vda: MEMBER}" in refused["hint"]
    assert [domain.name() for domain in lab.connection.listAllDomains()] == ["told by names"]
    assert any("disk-0.qcow2" in text for text in run_module("backup_info", archive=source)["archives"][0]["warnings"])
    assert restored("told by me", disk_images={"vda": "disk-1.qcow2", "vdb": "disk-0.qcow2"}) == contents
    wrong = run_module("vm_restore", source=source, path=place, disk_images={"vdc": "disk-1.qcow2"}, fails=True)
    assert "has no disk vdc" in wrong.message and "vda, vdb" in wrong.message


def test_a_foreign_overlay_stands_on_its_restored_base(lab: Lab, run_module: Run) -> None:
    folder, _dummy = unpacked(lab, "layered")
    top = folder / "vda.snapshot"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(folder / "vda.qcow2"), str(top))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 64k", str(top))
    content = truth.content_sha256(top, "qcow2")
    file = folder / "web.xml"
    file.write_text(file.read_text().replace("vda.qcow2", "vda.snapshot"))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    run("rm", "-r", str(folder))
    place = lab.path("restored")
    done = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(place))
    assert truth.content_sha256(lab.adopt("layered").disks()["vda"], "qcow2") == content, done.output
    flat = run_module("vm_restore", source=str(lab.directory / "x.tar"), name="flat", path=str(place), flatten=True)
    image = lab.adopt("flat").disks()["vda"]
    assert truth.content_sha256(image, "qcow2") == content and "flat-vda.qcow2" in {
        path.name for path in place.iterdir()
    }
    assert "backing file" not in run("qemu-img", "info", str(image)) and len(flat["disks"]) == 2


def test_a_foreign_disk_that_was_raw_is_raw_again(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("was raw", [Disk("raw")], start=False)
    image = vm.disks()["vda"]
    content, folder = truth.raw_sha256(image), lab.path("foreign")
    (folder / "web.xml").write_text(vm.xml(inactive=True))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), str(folder / f"{image.stem}.qcow2"))
    vm.remove()
    image.unlink()
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    (disk,) = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(image.parent))["disks"]
    assert (disk["format"], disk["path"]) == ("raw", str(image)) and truth.raw_sha256(image) == content
    assert "type='raw'" in lab.adopt("was raw").xml(inactive=True)
    again = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(image.parent), name="q", disk_format="qcow2")
    kept = lab.adopt("q").disks()["vda"]
    assert again["disks"][0]["format"] == "qcow2"
    assert truth.content_sha256(kept, "qcow2") == truth.content_sha256(image, "raw")


@pytest.mark.parametrize("trick", ["backing", "data-file", "not-qcow2", "foreign-base"])
def test_an_image_that_reaches_for_a_host_file_is_refused(lab: Lab, run_module: Run, trick: str) -> None:
    folder, _dummy = unpacked(lab, "hostile")
    secret = lab.directory / "secret"
    secret.write_bytes(b"s" * 65536)
    image = folder / "vda.qcow2"
    image.unlink()
    if trick == "backing":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(image))
    elif trick == "foreign-base":
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-F",
            "qcow2",
            "-b",
            "/templates/base.qcow2",
            str(image),
            "64M",
        )
    elif trick == "data-file":
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"data_file={lab.directory}/d.raw,data_file_raw=on",
            str(image),
            "1M",
        )
    else:
        image.write_bytes(b"KDMV" + bytes(65532))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    place = lab.path("restored")
    text = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(place), fails=True).message
    assert list(place.iterdir()) == [] and lab.connection.listAllDomains() == []
    assert {"backing": "secret", "foreign-base": "base.qcow2", "data-file": "d.raw", "not-qcow2": "vmdk"}[trick] in text


def test_a_foreign_definition_does_not_reach_the_host(lab: Lab, run_module: Run) -> None:
    folder, _dummy = unpacked(lab, "grabby")
    file = folder / "web.xml"
    grab = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/etc/shadow'/>"
        "<target dev='vdz' bus='virtio'/></disk>"
        "<filesystem type='mount'><source dir='/etc'/><target dir='t'/></filesystem>"
        "<serial type='file'><source path='/root/evil'/><target port='1'/></serial></devices>"
    )
    file.write_text(file.read_text().replace("</devices>", grab))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    done = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(lab.path("restored")))
    xml = lab.adopt("grabby").xml(inactive=True)
    assert "/etc" not in xml and "/root/evil" not in xml
    assert len(etree.fromstring(xml).findall("devices/serial")) == 2
    left_out = {item["device"].split()[0] for item in done["skipped_devices"]}
    assert left_out == {"vdz", "filesystem", "serial", "kernel", "initrd", "cmdline"}
    for item in done["skipped_devices"]:
        assert any(item["device"] in warning for warning in done.warnings)


def test_files_of_the_host_are_the_same_after_a_foreign_vm_has_run(lab: Lab, run_module: Run) -> None:
    """What a list of what is forbidden let through: media that were written to, probed or given away, and logs."""
    folder, _dummy = unpacked(lab, "taker")
    here, pool = lab.path("host"), lab.create_pool("private")
    public, secret, chain, log, volume = here / "a.img", here / "b", here / "c.iso", here / "d", pool / "e.img"
    for path, mode in ((public, 0o644), (secret, 0o600), (log, 0o644), (volume, 0o600)):
        path.write_bytes(b"x" * 1474560)
        path.chmod(mode)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(chain))
    chain.chmod(0o644)
    files = {path: (path.read_bytes(), path.stat().st_uid) for path in (public, secret, chain, log, volume)}
    file = folder / "web.xml"
    grab = (
        f"<disk type='file' device='floppy'><driver name='qemu' type='raw'/><source file='{public}'/><target dev='fda'/></disk>"
        f"<disk type='file' device='cdrom'><driver name='qemu' type='qcow2'/><source file='{chain}'/><target dev='sdx'/></disk>"
        f"<disk type='volume' device='cdrom'><source file='{public}' pool='private' volume='e.img'/><target dev='sdy'/></disk>"
        f"<channel type='pty'><target type='virtio' name='x.1'/><log file='{log}' append='off'/></channel>"
        f"<channel type='pty'><target type='virtio' name='x.2'/><log file='{here}/new' append='off'/></channel></devices>"
    )
    file.write_text(file.read_text().replace("</devices>", grab))
    archive = str(lab.directory / "x.tar")
    run("tar", "-C", str(folder), "-cf", archive, ".")
    place = str(lab.path("restored"))
    refused = run_module("vm_restore", source=archive, path=place, start=True, fails=True)
    assert "kernel" in refused.message and "start_reduced" in refused.message and not list(Path(place).iterdir())
    run_module("vm_restore", source=archive, path=place, start=True, start_reduced=True)
    vm = lab.adopt("taker")
    assert vm.is_running()
    running = etree.fromstring(vm.xml())
    media = {d.find("target").get("dev"): d for d in running.iterfind("devices/disk") if d.get("device") != "disk"}
    assert [media[each].find("driver").get("type") for each in ("fda", "sdx")] == ["raw", "raw"]
    assert media["sdy"].find("source") is None and all(d.find("readonly") is not None for d in media.values())
    assert {path: (path.read_bytes(), path.stat().st_uid) for path in files} == files  # also while it runs
    vm.destroy()
    assert {path: (path.read_bytes(), path.stat().st_uid) for path in files} == files
    assert not (here / "new").exists()


ELSEWHERE = "/vol/kvm-07/images"  # on the host that made the archive


def test_points_with_layers_on_paths_of_another_host(lab: Lab, run_module: Run) -> None:
    """A full and two increments: an XML each, overlays whose headers name their base on another host."""
    vm = lab.create_vm("elsewhere", start=False)
    folder = lab.path("foreign")
    definition, base = vm.xml(inactive=True), vm.disks()["vda"]
    vm.remove()
    times = (1_700_000_000, 1_700_086_400, 1_700_172_800)
    layers = [folder / "vda.qcow2", folder / "vda.1.snapshot", folder / "vda.2.snapshot"]
    base.rename(layers[0])
    contents = []
    for number, (time, layer) in enumerate(zip(times, layers)):
        if number:
            below = str(layers[number - 1])
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, str(layer))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number + 20}M 1M", str(layer))
        contents.append(truth.content_sha256(layer, "qcow2"))
        (folder / f"{time}.xml").write_text(definition.replace(str(base), f"{ELSEWHERE}/{layer.name}"))
    for below, layer in zip(layers, layers[1:]):
        run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", f"{ELSEWHERE}/{below.name}", "-f", "qcow2", str(layer))
    run("sh", "-c", f"tar -C '{folder}' -cf - . | zstd -q -19 -o '{lab.directory}/x.tar.zst'")
    run("rm", "-r", str(folder))
    source = str(lab.directory / "x.tar.zst")
    shown = run_module("backup_info", archive=source)["archives"][0]
    assert [point["point"] for point in shown["points"]] == list(times)
    assert (
        shown["config"]["disks"][0]["members"] == [layer.name for layer in layers] and shown["incrementable"] is False
    )
    for number, time in enumerate(times):
        place, name = lab.path(f"restored-{number}"), f"point-{number}"
        done = run_module("vm_restore", source=source, point=time, name=name, path=str(place))
        restored = lab.adopt(name)
        assert truth.content_sha256(restored.disks()["vda"], "qcow2") == contents[number], done.output
        assert ELSEWHERE not in restored.xml(inactive=True) and ELSEWHERE not in run(
            "qemu-img", "info", "--backing-chain", str(restored.disks()["vda"])
        )


def test_a_foreign_memory_image_and_a_cd(lab: Lab, run_module: Run) -> None:
    """The restored VM is off; reverted to the snapshot that the image has become, it goes on where it was."""
    disc = make_iso(lab.directory / "tools.iso", b"tools")
    vm = lab.create_vm("alive", isos=[disc])
    vm.agent.shell("echo remembered >/run/kept")
    folder, disk = lab.path("foreign"), vm.disks()["vda"]
    definition = vm.xml(inactive=True)
    overlay = f"<disk name='vda' snapshot='external'><source file='{disk}.top'/></disk><disk name='sda' snapshot='no'/>"
    xml = (
        f"<domainsnapshot><memory snapshot='external' file='{disk.parent}/m'/><disks>{overlay}</disks></domainsnapshot>"
    )
    vm.domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC)
    frozen = truth.content_sha256(disk, "qcow2", in_use=True)
    vm.remove()
    (folder / "1700000000_alive.xml").write_text(definition)
    disk.rename(folder / disk.name)
    (disk.parent / "m").rename(folder / "1700000000.memory")
    disc.rename(folder / disc.name)
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    run("rm", "-r", str(folder))
    place = lab.path("restored")
    source = str(lab.directory / "x.tar")
    done = run_module("vm_restore", source=source, path=str(place), trust=True)
    restored = lab.adopt("alive")
    assert done["snapshots"] == ["1700000000"] and not restored.is_running()
    assert truth.content_sha256(restored.disks()["vda"], "qcow2") == frozen
    assert (place / "tools.iso").read_bytes()[:5] == b"tools"
    assert not run_module("vm_restore", source=source, path=str(place), trust=True).changed
    run_module("vm_snapshot", vm="alive", snapshot="1700000000", state="reverted")
    restored.wait_until_up()
    assert restored.agent.shell("cat /run/kept").strip() == "remembered"
