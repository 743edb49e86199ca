# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which image of an archive made elsewhere is which disk's: told by names and formats, never by an order. Pure.

Tools name images after the disk's file, its target or both, with prefixes, dates and suffixes of their own. A disk gets the image
that its names speak for more than for any other, if that image's name speaks for no other disk as much; what no name speaks for
is paired by the format if there is one way only. Everything else is left to the user.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, Optional, TypeVar

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice

IMAGE_SUFFIXES = (".qcow2", ".snapshot", ".raw", ".img")
_WORD = re.compile(r"[^\W_]+")

_T = TypeVar("_T")
#: How much a name speaks for a disk, the most telling fact first; all zeros: not at all.
Evidence = tuple[int, int, int, int, int]
_NONE: Evidence = (0, 0, 0, 0, 0)


@dataclass(frozen=True)
class DefinedDisk:
    """What a definition says of a disk. `name`: that of a network volume, which has no `path`."""

    target: str
    path: str
    device: str
    format: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.target} ({self.path or self.name or 'no file'})"


@dataclass
class Pairs:
    """`tops`: the member that each disk showed last, by target. `named`: the targets whose file a member names exactly.

    `undecided`: disks that one of `choices` may belong to, and nothing tells which.
    """

    tops: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    warnings: list[Notice] = field(default_factory=list)
    undecided: list[DefinedDisk] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


def chain(top: str, images: Mapping[str, Member]) -> list[Member]:
    """The layers up to `top`, lowest first."""
    found: dict[str, Member] = {}
    name = top
    while name in images and name not in found:
        found[name] = images[name]
        name = images[name].parent
    return list(reversed(found.values()))


def pair(disks: Sequence[DefinedDisk], images: Mapping[str, Member], said: Mapping[str, str]) -> Pairs:
    """Pairs the disks of one configuration with images. `said`: what the user has said, by target; "" for no image."""
    found = Pairs({target: name for target, name in said.items() if name})
    decided = {disk for disk in disks if disk.target in said}
    open_disks = [disk for disk in disks if disk not in decided]
    _pair_exactly(open_disks, images, found)
    leaves = _free_leaves(images, found.tops.values())
    scores = {disk: _scores(disk, images, leaves) for disk in disks}
    left = [disk for disk in open_disks if disk.target not in found.tops]
    for disk, leaf in _by_names(left, leaves, lambda disk, leaf: scores[disk][leaf], disks).items():
        _take(disk, leaf, images, found)
    leaves = _free_leaves(images, found.tops.values())
    left = [disk for disk in open_disks if disk.target not in found.tops]
    if all(scores[disk][leaf] == _NONE for disk in disks for leaf in leaves):
        for disk, leaf in _by_format(left, [images[leaf] for leaf in leaves]).items():
            found.tops[disk.target] = leaf
            text = f"disk {disk} was matched with {leaf}, since no other fits; no name tells"
            found.warnings.append(Notice(Code.MATCHED_BY_GUESS, text))
        left = [disk for disk in left if disk.target not in found.tops]
        leaves = [leaf for leaf in leaves if leaf not in found.tops.values()]
    if leaves:
        found.undecided, found.choices = left, leaves
    return found


def _pair_exactly(disks: Iterable[DefinedDisk], images: Mapping[str, Member], found: Pairs) -> None:
    """A member that has the name of a disk's file, or that with a suffix of its own; not where another disk's file has it too."""
    claims: dict[str, dict[str, list[DefinedDisk]]] = {}
    with_suffix: dict[str, list[str]] = {}
    for name in images:
        with_suffix.setdefault(os.path.splitext(name)[0], []).append(name)
    for disk in disks:
        base = os.path.basename(disk.path)
        own = [base] if base in images else with_suffix.get(base, []) if "." in base else []
        if len(own) == 1:
            claims.setdefault(own[0], {}).setdefault(disk.path, []).append(disk)
    for name, by_path in claims.items():
        if len(by_path) == 1 and name not in found.tops.values():
            for disk in next(iter(by_path.values())):
                found.tops[disk.target] = name
                found.named.add(disk.target)


def _take(disk: DefinedDisk, leaf: str, images: Mapping[str, Member], found: Pairs) -> None:
    """The disk gets a chain: up to the one layer whose name has that of the disk's file in it, else all of it."""
    layers = chain(leaf, images)
    by_whole = [member.name for member in layers if _evidence(disk, member.name)[0]]
    found.tops[disk.target] = by_whole[0] if len(by_whole) == 1 else leaf
    if len(by_whole) == 1:
        found.named.add(disk.target)
        return
    # web01.monday may be an overlay on web01.qcow2, which is older then
    may_be_overlay = not by_whole and os.path.splitext(disk.path)[1].lower() not in ("", *IMAGE_SUFFIXES)
    if may_be_overlay and any(_evidence(disk, member.name)[2] for member in layers):
        how = f"was matched with {leaf} by the beginning of its name only; it may be newer than that"
        found.warnings.append(Notice(Code.MATCHED_BY_GUESS, f"disk {disk} {how}"))


def _free_leaves(images: Mapping[str, Member], tops: Collection[str]) -> list[str]:
    """Images that no other stands on, and that stand on nothing that a disk shows."""
    parents = {member.parent for member in images.values()}
    shown = set(tops)
    below: dict[str, bool] = {}  # whether a shown image is at or below this one
    for name in images:
        path = []
        while name in images and name not in below:
            below[name] = name in shown  # also ends circles
            path.append(name)
            name = images[name].parent
        reached = below.get(name, False)
        for each in reversed(path):
            reached = below[each] = below[each] or reached
    return sorted(name for name in images if name not in parents and not below[name])


def _scores(disk: DefinedDisk, images: Mapping[str, Member], leaves: Iterable[str]) -> dict[str, Evidence]:
    """What speaks for a disk in the name of a leaf or of a layer below it."""
    best: dict[str, Evidence] = {}
    for name in images:
        path = []
        while name in images and name not in best:
            best[name] = _evidence(disk, name)
            path.append(name)
            name = images[name].parent
        reached = best.get(name, _NONE)
        for each in reversed(path):
            reached = best[each] = max(best[each], reached)
    return {leaf: best[leaf] for leaf in leaves}


def _evidence(disk: DefinedDisk, name: str) -> Evidence:
    """What in a member's name speaks for a disk: words of the file's name (and of its directory), the target."""
    place, base = os.path.split(disk.path or disk.name)
    stem, member = os.path.splitext(base)[0], _words(name)
    around, whole, short = _words(place), _words(base), _words(stem)
    own = _words(_without_suffix(name))
    return (
        _common(around, whole, member),
        int(bool(stem) and os.path.splitext(name)[0] == stem),
        _common(around, short, member),
        0 if disk.target not in member else 2 if member[0] == disk.target else 1,
        len(own) if _has(short, own) else 0,
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _has(words: Sequence[str], part: Sequence[str]) -> bool:
    count = len(part)
    return count > 0 and any(words[at : at + count] == part for at in range(len(words) - count + 1))


def _common(around: list[str], wanted: list[str], words: list[str]) -> int:
    """How many words a name has in common with a path, from its end, if the `wanted` last ones are among them."""
    if not _has(words, wanted):
        return 0
    whole = around + wanted
    count = len(wanted)
    while count < len(whole) and _has(words, whole[-count - 1 :]):
        count += 1
    return count


def _by_names(
    disks: Sequence[DefinedDisk],
    leaves: Sequence[str],
    score: Callable[[DefinedDisk, str], Evidence],
    rivals: Sequence[DefinedDisk],
) -> dict[DefinedDisk, str]:
    """Pairs of which each speaks most for the other: a leaf among all disks, a disk among the leaves that are left."""
    found: dict[DefinedDisk, str] = {}
    wanted_by: dict[str, Optional[DefinedDisk]] = {}
    for leaf in leaves:
        wanted_by[leaf] = _best(rivals, lambda disk, leaf=leaf: score(disk, leaf))  # type: ignore[misc]
    while True:
        free = [leaf for leaf in leaves if leaf not in found.values()]
        new: dict[DefinedDisk, str] = {}
        for disk in disks:
            if disk not in found:
                best = _best(free, lambda leaf, disk=disk: score(disk, leaf))  # type: ignore[misc]
                if best is not None and wanted_by[best] == disk:
                    new[disk] = best
        if not new:
            return found
        found.update(new)


def _best(items: Iterable[_T], score: Callable[[_T], Evidence]) -> Optional[_T]:
    """The one that scores more than every other, and at all; None where there is none."""
    best: Optional[_T] = None
    highest = _NONE
    for item in items:
        mark = score(item)
        if mark > highest:
            best, highest = item, mark
        elif mark == highest:
            best = None
    return best


def _by_format(disks: Sequence[DefinedDisk], images: Sequence[Member]) -> dict[DefinedDisk, str]:
    """The one way to give every disk an image of its own that can be its; nothing where there are several, or none."""
    found: dict[DefinedDisk, str] = {}
    if len(disks) != len(images):
        return found
    open_disks, free = list(disks), list(images)
    while open_disks:
        only = next(
            ((disk, fit[0]) for disk in open_disks for fit in [[m for m in free if _fits(disk, m)]] if len(fit) == 1),
            None,
        )
        if only is None:
            return {}
        found[only[0]] = only[1].name
        open_disks.remove(only[0])
        free.remove(only[1])
    return found


def _fits(disk: DefinedDisk, image: Member) -> bool:
    """A raw disk may have been stored as qcow2, but what is raw has not been the file of a qcow2 disk."""
    return image.image_format != "raw" or disk.format in ("", "raw")
