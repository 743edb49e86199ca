# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``backup_info`` does: list archives and show what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import InfoRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, Point
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import jmespath
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

#: Whether an archive can be continued (None: not known here), and why not.
Judge = Callable[[ArchiveView], tuple[Optional[bool], str]]


#: What there is to say about the template that a point of a thin clone needs.
AboutTemplate = Callable[[Point], Sequence[str]]


def info(
    request: InfoRequest,
    context: Context,
    judge: Judge | None = None,
    about_template: AboutTemplate | None = None,
) -> dict[str, Any]:
    """The result of ``backup_info``. `judge` and `about_template` look at the VMs of this host; without them nothing is known.

    Raises ArchiveError for an archive that was named and cannot be read, and for a place that cannot be listed. In a place, an
    archive that cannot be read is listed with the reason.
    """
    selection = request.selection
    views: list[ArchiveView] = []
    unreadable: dict[str, str] = {}
    for path in select.paths(selection, context):
        try:
            if request.refresh:
                context.progress.phase("read", path)
                views.append(catalog.look(path, refresh=True))
            else:
                views.append(catalog.glance(path, context.progress))
        except ArchiveError as error:
            if selection.archive:
                raise
            unreadable[path] = str(error)
    if selection.vm:
        views = select.of_vm(views, selection.vm, select.vm_on_host(selection, context))
        for path, why in unreadable.items():
            context.warn(Notice(Code.NOT_LOOKED_AT, f"{path} is not listed, as nobody knows whose it is: {why}"))
        unreadable = {}
    views = select.without_twins(views)
    if request.point is not None and not selection.archive:
        views = [view for view in views if any(point.timestamp == request.point for point in view.points)]
    views.sort(key=lambda view: (view.newest.vm_name, view.newest.vm_uuid, view.newest.timestamp, view.path))
    result: dict[str, Any] = {
        "archives": [
            *(_entry(view, request.point, judge, about_template) for view in views),
            *(catalog.unreadable(path, why) for path, why in unreadable.items()),
        ]
    }
    if request.query:
        result["matches"] = _matches(request.query, result)
    return result


def _entry(
    view: ArchiveView, point: int | None, judge: Judge | None, about_template: AboutTemplate | None
) -> dict[str, Any]:
    entry = catalog.entry(view, point)
    if about_template:
        entry["warnings"] += about_template(view.point(point))
    if judge and entry["incrementable"] is None:
        entry["incrementable"], why = judge(view)
        entry["incrementable_reason"] = f"no increment can be added: {why}" if entry["incrementable"] is False else why
        if why:
            entry["warnings"].append(entry["incrementable_reason"])
    return entry


def _matches(query: str, result: dict[str, Any]) -> Any:
    try:
        return jmespath.search(query, result)
    except jmespath.exceptions.JMESPathError as error:
        raise RefusedError("Option query", str(error), "See https://jmespath.org for the language.") from error
