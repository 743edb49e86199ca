# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's note about a running VM, put right."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import status_xml

NOTE = """<?xml version='1.0'?>
<domstatus state='running' pid='17'>
  <blockjobs active='yes'><blockjob name='commit-vda-libvirt-1-format'/></blockjobs>
  <domain type='qemu' id='1'>
    <devices>
      <disk type='file'><target dev='vda'/>{vda}</disk>
      <disk type='file'><target dev='vdb'/>{vdb}</disk>
    </devices>
  </domain>
</domstatus>
"""
LIVING = "<mirror type='file' job='active-commit' ready='yes'><source file='/b'/></mirror>"
UNREADABLE = "<mirror type='file' job=''><source file='/a'/></mirror>"


def disks(text):
    found = _xml.parse(text).iterfind("domain/devices/disk")
    return {disk.find("target").get("dev"): disk.find("mirror") is not None for disk in found}


def test_only_what_libvirt_cannot_read_goes():
    note = NOTE.format(vda=UNREADABLE, vdb=LIVING)
    assert disks(status_xml.put_right(note, (), {})) == {"vda": False, "vdb": True}


def test_a_job_that_nobody_has_goes_by_the_name_of_its_disk():
    note = NOTE.format(vda=LIVING, vdb=LIVING)
    assert disks(status_xml.put_right(note, ("vdb",), {})) == {"vda": True, "vdb": False}


def test_all_else_stays():
    note = NOTE.format(vda=UNREADABLE, vdb="")
    then = NOTE.format(vda="", vdb="").replace("'", '"')
    assert status_xml.put_right(note, (), {}).replace("'", '"') == then


def link(name, below):
    """As libvirt 9.0 notes it."""
    return (
        f"<backingStore type='file' index='{name[1:]}'><format type='qcow2'/><source file='/{name}'><privateData><nodenames>"
        f"<nodename type='format' name='libvirt-{name[1:]}-format'/></nodenames></privateData></source>{below}</backingStore>"
    )


def test_merged_layers_go_with_their_nodes_and_what_they_stood_on_stays():
    chain = link("o4", link("o3", link("o2", link("o1", "<backingStore/>"))))
    note = NOTE.format(vda=chain, vdb=chain)
    then = NOTE.format(vda=link("o4", link("o1", "<backingStore/>")), vdb=chain)
    found = status_xml.put_right(note, (), {"vda": ("/o3", "/o2"), "vdc": ("/o1",)})
    assert found.replace("'", '"') == then.replace("'", '"')


def test_a_link_of_which_is_not_said_what_it_stands_on_stays():
    note = NOTE.format(vda=link("o2", link("o1", "")), vdb=LIVING)
    assert status_xml.put_right(note, (), {"vda": ("/o1",)}) == note
