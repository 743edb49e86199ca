# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lines the guest's writer leaves behind: NUMBER EPOCH UPTIME, numbered from 1 without a gap."""

from __future__ import annotations

from dataclasses import dataclass

from ._run import LabError


@dataclass(frozen=True)
class Marker:
    """One line of the log: running number, guest's wall clock and uptime when it was written."""

    number: int
    epoch_s: int
    uptime_s: float

    @classmethod
    def parse(cls, line: str) -> Marker:
        """Raises LabError for a line the writer would not have written."""
        try:
            number, epoch, uptime = line.split()
            return cls(int(number), int(epoch), float(uptime))
        except ValueError:
            raise LabError(f"not a marker line: {line!r}") from None


def parse_log(text: str) -> list[Marker]:
    """All markers of a log; LabError when a line is torn or a number is missing."""
    if text and not text.endswith("\n"):
        raise LabError(f"torn last line: {text[-80:]!r}")
    markers = [Marker.parse(line) for line in text.splitlines()]
    numbers = [marker.number for marker in markers]
    if numbers != list(range(1, len(numbers) + 1)):
        raise LabError(f"marker numbers are not 1…{len(numbers)}: {numbers[:5]}…{numbers[-5:]}")
    return markers


def parse_crashed_log(text: str) -> list[Marker]:
    """All markers of a log whose guest was cut off: the line it was writing may be torn, or zeros that ext4 had not filled yet."""
    return parse_log(text[: text.rstrip("\0").rfind("\n") + 1])
