# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fuzzing: whatever others wrote ends in a result or in an error of ours, in bounded time and memory.

A run takes seconds and prints its seeds. ``KVMOPS_BACKUP_EXHAUSTIVE=1 pytest tests/unit -k fuzz`` takes ten minutes,
``KVMOPS_BACKUP_FUZZ_SEED=N`` runs one seed again.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError

SECONDS = 600 if os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE") else 8
_SEED = os.environ.get("KVMOPS_BACKUP_FUZZ_SEED", "")
_EXAMPLES = 25  # with one seed; the clock is looked at behind them
MAX_SECONDS = 10
MAX_GROWTH_KIB = 300 * 1024

#: What a number is replaced by, and what a text is.
ODD_NUMBERS = (
    "", "0", "1", "-1", "+1", "007", " 7 ", "1e400", "nan", "inf", "0x10", "²", "٣", "9" * 19, "9" * 30, "9" * 5000,
)  # fmt: skip
ODD = (
    *ODD_NUMBERS, "yes", "no",
    "/", "//", ".", "..", "../x", "/etc/passwd", "/dev/null", "a/b", "a b", "vda", "vdb", "web", "é", "\u202e", "\ufffd", "😀",
    "%00", "%1B[2J", "{{ 1 // 0 }}", "<b>", "&", "json:{}", "nbd://127.0.0.1:9/x", "x" * 300, "x" * 70_000, "qcow2", "raw",
    "file", "block", "volume", "network", "disk", "cdrom", "lun", "external", "internal", "full", "off", "memory",
    "1700000000", "1800000000", "99999999999", "18446744073709551616",
)  # fmt: skip


def fuzz(share: float, strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """A test that looks at what the strategy makes, with one seed after the other, for that share of the whole run's time."""

    def decorate(check: Callable[[Any], None]) -> Callable[[], None]:
        def test() -> None:
            deadline = time.monotonic() + share * SECONDS
            while True:
                number = int(_SEED or secrets.randbelow(2**32))
                print(f"KVMOPS_BACKUP_FUZZ_SEED={number}")
                limits = settings(
                    max_examples=_EXAMPLES,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate, Phase.shrink],
                )
                seeded(number)(limits(given(strategy)(check)))()
                if _SEED or time.monotonic() >= deadline:
                    return

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """What runs inside may end in an error of ours, soon and without much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; see proc(5)
    before, begin = _peak_kib(), time.process_time()
    with contextlib.suppress(KvmopsError):
        yield
    seconds, growth = time.process_time() - begin, _peak_kib() - before
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
    assert growth < MAX_GROWTH_KIB, f"{growth // 1024} MiB"


def _peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no peak in /proc/self/status")


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes, most: int = 6) -> bytes:
    """Bytes of which a few pieces are others, gone, or twice there."""
    for _dummy in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((0, 1, 2, 4, 8, 64, 512, 4096)))
        kind = draw(st.integers(0, 6))
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + draw(st.binary(max_size=12)) + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + data[at : at + length] * draw(st.integers(1, 3)) + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            fill = draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x80")))
            data = data[:at] + fill * len(data[at : at + length]) + data[at + length :]
        else:
            begin = draw(st.integers(0, len(data)))
            data = data[:at] + data[begin : begin + length] + data[at + length :]
    return data


@st.composite
def broken_xml(draw: st.DrawFn, documents: Sequence[str], most: int = 8) -> str:
    """One of the documents with elements, attributes and texts that are odd, gone, twice there or elsewhere."""
    root = etree.fromstring(draw(st.sampled_from(documents)))
    for _dummy in range(draw(st.integers(0, most))):
        elements = [each for each in root.iter() if isinstance(each.tag, str)]
        element = elements[draw(st.integers(0, len(elements) - 1))]
        other = elements[draw(st.integers(0, len(elements) - 1))]
        odd = draw(st.sampled_from(ODD) | _XML_TEXT)
        kind = draw(st.integers(0, 10))
        if kind == 0 and element.attrib:
            element.set(draw(st.sampled_from(sorted(element.attrib))), odd)
        elif kind == 10:
            numbers = [each for each in elements if (each.text or "").strip().isdigit()]
            if numbers:
                draw(st.sampled_from(numbers)).text = draw(st.sampled_from(ODD_NUMBERS))
        elif kind == 1 and element.attrib:
            del element.attrib[draw(st.sampled_from(sorted(element.attrib)))]
        elif kind == 2 and other.attrib:
            element.set(draw(st.sampled_from(sorted(other.attrib))), odd)
        elif kind == 3:
            element.text = odd
        elif kind == 4 and element is not root:
            element.getparent().remove(element)
        elif kind == 5 and element is not root:
            element.addnext(copy.deepcopy(element))
        elif kind == 6:
            element.append(copy.deepcopy(other))
        elif kind == 7:
            element.tag = other.tag
        elif kind == 8:
            element.insert(0, draw(st.sampled_from((etree.Comment("x"), etree.PI("x", "y")))))
            element[0].tail = odd
        elif element is not root:
            element.tail = odd
    return etree.tostring(root, encoding="unicode")


_XML_TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff") | st.sampled_from("\t\n\r<&\"' "),
    max_size=20,
)


def json_values(*keys: str) -> st.SearchStrategy[Any]:
    """Anything that JSON (or Python's idea of it) can say; these names are likely keys and texts."""
    names = st.sampled_from(keys) | st.sampled_from(ODD[:20]) | st.text(max_size=8)
    numbers = st.integers() | st.floats() | st.sampled_from((-1, 0, 2**31, 2**63, 10**400))
    return st.recursive(
        st.none() | st.booleans() | numbers | names,
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(names, inner, max_size=8),
        max_leaves=12,
    )
