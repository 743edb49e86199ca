# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether KVM works here, told by ten million instructions that a virtual processor has to get through.

In some clouds and containers /dev/kvm is there and no guest comes up: it refuses a processor, or emulates every instruction, some
thousand times slower than QEMU without it. Run as a program, ends with 0 where it works.
Standard library only: the quickstart asks before anything is installed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys

# linux/kvm.h
_GET_API_VERSION, _API_VERSION = 0xAE00, 12
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_RUN, _EXIT_HLT = 0xAE80, 5
_GET_SUPPORTED_CPUID, _SET_CPUID2, _CPUID_ENTRIES = 0xC008AE05, 0x4008AE90, 256
_SET_REGS = 0x4090AE82
_GET_SREGS, _SET_SREGS = 0x8138AE83, 0x4138AE84

_PAGE = 4096
_TABLES = (1, 2, 3)  # pages of the three levels that map the first 2 MiB to themselves
_PRESENT_WRITABLE, _LARGE_PAGE = 0x3, 0x80
_PROTECTED_PAGED, _PAE, _LONG_MODE = 0x80050033, 0x20, 0x500
# mov ecx, 5000000; again: dec ecx; jnz again; hlt
_PROGRAM = b"\xb9" + struct.pack("<I", 5_000_000) + b"\xff\xc9\x75\xfc\xf4"


def kvm_works(device: str = "/dev/kvm", timeout_s: float = 2) -> bool:
    """Whether a virtual processor runs as fast as it should. A process of its own tries it: it may never come back."""
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    trial = subprocess.Popen(
        [sys.executable, "-I", __file__, device],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert trial.stdout is not None
    with trial.stdout as said:
        said.readline()  # it is about to run, or has failed
        try:
            return trial.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            trial.kill()  # not waited for: it may be stuck in the kernel
            return False


def gets_to_the_end(device: str) -> bool:
    """Whether a virtual processor in 64-bit mode gets to the end of a program. Real mode would say little: some emulate it."""
    with open(device, "r+b", buffering=0) as kvm:
        if fcntl.ioctl(kvm, _GET_API_VERSION) != _API_VERSION:
            return False
        memory = mmap.mmap(-1, (1 + len(_TABLES)) * _PAGE)
        memory[: len(_PROGRAM)] = _PROGRAM
        for table, entry in zip(_TABLES, (_TABLES[1] * _PAGE, _TABLES[2] * _PAGE, _LARGE_PAGE)):
            struct.pack_into("<Q", memory, table * _PAGE, entry | _PRESENT_WRITABLE)
        vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, len(memory), address))
        cpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
        state = mmap.mmap(cpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
        features = bytearray(struct.pack("=II", _CPUID_ENTRIES, 0) + bytes(40 * _CPUID_ENTRIES))
        fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, features)
        fcntl.ioctl(cpu, _SET_CPUID2, features)
        special = bytearray(312)  # struct kvm_sregs: six segments, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, …
        fcntl.ioctl(cpu, _GET_SREGS, special)
        special[: 6 * 24] = _segment(8, code=True) + 5 * _segment(16, code=False)
        struct.pack_into("=6Q", special, 224, _PROTECTED_PAGED, 0, _TABLES[0] * _PAGE, _PAE, 0, _LONG_MODE)
        fcntl.ioctl(cpu, _SET_SREGS, bytes(special))
        fcntl.ioctl(cpu, _SET_REGS, struct.pack("=18Q", *[0] * 17, 2))  # from 0 on, with the flag that is always set
        print("about to run", flush=True)
        fcntl.ioctl(cpu, _RUN, 0)
        return bool(struct.unpack_from("=I", state, 8)[0] == _EXIT_HLT)


def _segment(selector: int, code: bool) -> bytes:
    """A struct kvm_segment over all memory: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable."""
    return struct.pack("=QIH8B2x", 0, 0xFFFFFFFF, selector, 11 if code else 3, 1, 0, not code, 1, code, 1, 0)


def main() -> None:
    """``kvm.py``: the question, with an exit code as answer. ``kvm.py DEVICE``: the trial."""
    if sys.argv[1:]:
        sys.exit(0 if gets_to_the_end(sys.argv[1]) else 1)
    sys.exit(0 if kvm_works() else 1)


if __name__ == "__main__":
    main()
