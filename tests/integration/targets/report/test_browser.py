# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report page in a real browser: nothing sticks out at any width, light and dark differ and can be read."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.plugin_utils._report import model, page
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.unit.plugins.plugin_utils.report_hosts import NOW, many

# Screenshots for people go there.
SHOTS = os.environ.get("KVMOPS_REPORT_SHOTS", "")

# Asks the page, inside a frame of the wanted width, what it looks like; contrast as WCAG defines it.
MEASURE = """
<!DOCTYPE html><body style="margin:0">
<iframe id="f" style="border:0;width:%(width)dpx;height:900px" srcdoc="%(page)s"></iframe><script>
onload = () => {
  const frame = document.getElementById('f').contentDocument, root = frame.documentElement, view = frame.defaultView;
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(view.getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
  let worst = 99, where = '', out = [];
  for (const e of frame.querySelectorAll('main *')) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > root.clientWidth + 1 || box.left < -1) && !e.closest('svg')) out.push(e.outerHTML.slice(0, 90));
    if (e.closest('svg') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(rgb(view.getComputedStyle(e).color).slice(0, 3)), b = light(behind(e));
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < worst) { worst = contrast; where = e.outerHTML.slice(0, 90) }
  }
  const rows = [...frame.querySelectorAll('tbody tr')];
  document.body.innerHTML = '<pre id="found">' + btoa(unescape(encodeURIComponent(JSON.stringify({
    scroll: root.scrollWidth, client: root.clientWidth, out: out.slice(0, 5), worst, where, rows: rows.length,
    background: view.getComputedStyle(frame.body).backgroundColor,
    overlap: rows.some((r, i) => i && r.getBoundingClientRect().top < rows[i - 1].getBoundingClientRect().bottom - 1),
    marks: frame.querySelectorAll('svg rect').length,
    unseen: [...frame.querySelectorAll('svg rect')].filter((r) => !r.getBoundingClientRect().height).length })))) + '</pre>';
};
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("Chromium is not installed here")
    return str(found)


def rendered(count: int) -> str:
    report = model.report(many(count), now=NOW, max_age="26h")
    return page.render(report, title="Backups of the virtual machines")


def chromium(browser: str, directory: Path, dark: bool, *arguments: str) -> str:
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={directory / 'profile'}",
    ]
    return run(browser, *common, *scheme, *arguments, timeout_s=300)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("count", "width"), [(5, 1280), (5, 390), (5, 320), (200, 1280), (200, 390), (0, 390)])
def test_it_looks_right(browser: str, tmp_path: Path, count: int, width: int, dark: bool) -> None:
    text = rendered(count)
    wrapper = tmp_path / "measure.html"
    wrapper.write_text(MEASURE % {"width": width, "page": html.escape(text)}, encoding="utf-8")
    dumped = chromium(browser, tmp_path, dark, "--window-size=1400,1000", "--dump-dom", f"file://{wrapper}")
    match = re.search(r'id="found">([\w+/=]+)<', dumped)
    assert match, dumped[:2000]
    found: dict[str, Any] = json.loads(base64.b64decode(match.group(1)))

    assert found["out"] == []
    assert found["scroll"] <= found["client"] == width
    assert found["worst"] >= 4.5, found["where"]
    assert not found["overlap"]
    assert found["unseen"] == 0
    assert found["rows"] == count + 1
    assert found["marks"] > 10 * count
    lightness = sum(map(int, re.findall(r"\d+", found["background"])[:3]))
    assert lightness < 120 if dark else lightness > 700

    if SHOTS:
        plain = tmp_path / "page.html"
        plain.write_text(text, encoding="utf-8")
        target = Path(SHOTS) / f"{count}-{width}-{'dark' if dark else 'light'}.png"
        shown = plain
        if width < 500:  # the browser's own window cannot be as narrow
            shown = tmp_path / "framed.html"
            frame = f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:1500px" srcdoc="{html.escape(text)}">'
            shown.write_text(frame, encoding="utf-8")
        size = f"--window-size={max(width, 500)},1500"
        chromium(browser, tmp_path, dark, size, f"--screenshot={target}", f"file://{shown}")
