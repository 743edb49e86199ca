# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests do on a whole host beside running modules: one process there, so that libraries are loaded once per boot.

Reads calls as lines of JSON, ``{"call": NAME, "arguments": {…}}``, and answers each with ``{"result": …}`` or ``{"error": TEXT}``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import truth
from .._run import run, wait_for
from ..modules import ModuleResult, module_argv, module_result
from ..vm import Disk, Hypervisor, Lab

_STATUS = Path("/run/kvmops-backup/status")
_BEGUN_LOG = Path("/run/kvmops-lab-module.log")


class Worker:
    """The calls. All paths are texts, all results JSON."""

    def __init__(self) -> None:
        self._hypervisor = Hypervisor()
        self._labs: dict[str, Lab] = {}
        self._begun: subprocess.Popen[str] | None = None

    # --- VMs ---

    def create_vm(
        self,
        name: str,
        disks: int = 2,
        agent: bool = True,
        autostart: bool = False,
        image_format: str = "qcow2",
        volumes: Sequence[str] = (),
        start: bool = True,
        beside: str = "/var/lib/libvirt/images",
        ports: int = 0,
    ) -> None:
        """A VM with small ext4 disks, below the directory ``beside``, and then block devices; see ``Lab.create_vm``.

        ``ports`` are free for disks that are plugged in later.
        """
        lab = self._labs.get(beside) or Lab(Path(f"{beside}/lab-{time.time_ns()}"), domain_type="kvm")
        self._labs[beside] = lab
        devices = "".join(
            "<disk type='block' device='disk'><driver name='qemu' type='raw'/>"
            f"<source dev='{volume}'/><target dev='vd{letter}'/></disk>"
            for volume, letter in zip(volumes, "wxyz")
        )
        devices += "<controller type='pci' model='pcie-root-port'/>" * ports
        made = [Disk(image_format, size_mib=16)] * disks
        vm = lab.create_vm(name, made, agent=agent, freeze_mode="pause", extra_devices=devices, start=False)
        vm.domain.setAutostart(autostart)
        if start:
            vm.start()

    def start(self, name: str) -> None:
        """Returns when the guest is up."""
        self._hypervisor.vm(name).start()

    def wait_until_up(self, name: str) -> None:
        """The guest's agent answers."""
        wait_for(f"{name} to run", self._hypervisor.vm(name).is_running, 300)
        self._hypervisor.vm(name).wait_until_up()

    def destroy(self, name: str) -> None:
        """Pulls the guest's plug."""
        self._hypervisor.vm(name).destroy()

    def shutdown(self, name: str) -> None:
        """By the power button; returns when it is off."""
        self._hypervisor.vm(name).shutdown()

    def is_running(self, name: str) -> bool:
        """As libvirt says."""
        return self._hypervisor.vm(name).is_running()

    def write_more(self, name: str) -> None:
        """Returns when the guest has written another line to each disk."""
        vm = self._hypervisor.vm(name)
        vm.wait_for_marker(vm.last_marker().number + 2)

    def shell(self, name: str, script: str) -> str:
        """Standard output of a script in the guest."""
        return self._hypervisor.vm(name).agent.shell(script)

    def freeze_status(self, name: str) -> str:
        """``frozen`` or ``thawed``."""
        return self._hypervisor.vm(name).agent.freeze_status()

    def frozen_digests(self, name: str) -> str:
        """See ``LabVm``."""
        return self._hypervisor.vm(name).frozen_digests()

    def booted_digests(self, name: str) -> str:
        """See ``LabVm``."""
        return self._hypervisor.vm(name).booted_digests()

    def chains(self, name: str) -> dict[str, list[str]]:
        """Files of each disk, from the one that the guest writes to down to the lowest."""
        return {
            target: [layer["filename"] for layer in self._layers(str(path))]
            for target, path in self._hypervisor.vm(name).disks().items()
        }

    @staticmethod
    def _layers(path: str) -> list[dict[str, Any]]:
        layers: list[dict[str, Any]] = json.loads(
            run("qemu-img", "info", "-U", "--backing-chain", "--output=json", path)
        )
        return layers

    def content(self, name: str, frozen: bool = False) -> dict[str, str]:
        """Digest of each disk's virtual content; with ``frozen``, of what the guest does not write to any more."""
        digests = {}
        for target, path in self._hypervisor.vm(name).disks().items():
            layers = self._layers(str(path))
            layer = layers[1] if frozen else layers[0]
            digests[target] = truth.content_sha256(layer["filename"], layer["format"], in_use=frozen)
        return digests

    def remove_vm(self, name: str) -> None:
        """With the files of all its layers that lie beside its disks: not those of a template."""
        chains = [[Path(layer) for layer in chain] for chain in self.chains(name).values()]
        files = [layer for chain in chains for layer in chain if layer.parent == chain[0].parent]
        self._hypervisor.vm(name).remove()
        for file in files:
            file.unlink()

    # --- modules that tests do something beside ---

    def begin(self, module: str, arguments: dict[str, Any]) -> None:
        """Starts a module and returns."""
        with open(_BEGUN_LOG, "w") as log:
            self._begun = subprocess.Popen(
                module_argv(module, arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait_for_phase(self, phases: list[str], percent: float = 0) -> None:
        """Until the module that was begun says that it is in one of these phases, and how far; an error when it ends before."""
        assert self._begun is not None
        begun = self._begun

        def is_there() -> bool:
            assert begun.poll() is None, f"the module ended before: {_BEGUN_LOG.read_text()}"
            with suppress(FileNotFoundError):  # not yet written, or just now replaced
                for path in _STATUS.glob(f"*-{begun.pid}.json"):
                    status = json.loads(path.read_text())
                    return status["phase"] in phases and (status["percent"] or 0) >= percent
            return False

        wait_for(f"phase {phases} of {percent} %", is_there, 300, every_s=0.02)

    def end(self) -> dict[str, Any]:
        """What the module that was begun returned."""
        assert self._begun is not None
        self._begun.wait(900)
        result: ModuleResult = module_result("the module", _BEGUN_LOG.read_text(), "")
        return result.data

    # --- files ---

    def files(self, directory: str) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(path.name for path in Path(directory).iterdir())


def main() -> None:
    """Answers until its input ends."""
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        function: Callable[..., Any] = getattr(worker, request["call"])
        try:
            answer = {"result": function(**request["arguments"])}
        except Exception:  # whatever it was, the test shows it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
