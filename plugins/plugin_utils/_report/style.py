# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The look of the report: light and dark, wide and narrow, on paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme:light dark; --page:#f6f7f9; --card:#fff; --text:#1b1f24; --soft:#5a6472; --line:#dfe3e8;
  --full:#2f6fb3; --inc:#8db9e8; --good:#15683c; --late:#8a5000; --bad:#b3261e; --goodbg:#e2f4ea;
  --latebg:#fff0d6; --badbg:#fde5e3; --softbg:#eceff3;
}
@media(prefers-color-scheme:dark) {
  :root {
    --page:#14171b; --card:#1d2126; --text:#e7eaee; --soft:#9aa5b3; --line:#333a43; --full:#6fb0f2;
    --inc:#3c6a9b; --good:#6fd8a0; --late:#f2b95c; --bad:#ff938a; --goodbg:#173526; --latebg:#3b2c10;
    --badbg:#43201d; --softbg:#2a3038;
  }
}
* { box-sizing:border-box }
body {
  margin:0; background:var(--page); color:var(--text);
  font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
}
main { max-width:1280px; margin:0 auto; padding:24px 20px 48px }
h1 { font-size:24px; margin:0 0 4px }
h2 { font-size:17px; margin:32px 0 8px }
.when,.soft { color:var(--soft) }
.soft { font-size:13px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(120px,1fr)); gap:12px; margin:20px 0 }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 14px }
.tile b { display:block; font-size:26px; line-height:1.2; font-variant-numeric:tabular-nums }
.tile.good b { color:var(--good) }
.tile.late b { color:var(--late) }
.tile.bad b { color:var(--bad) }
.key { display:flex; flex-wrap:wrap; gap:4px 18px; color:var(--soft); font-size:13px; margin:0 0 10px }
.key i { display:inline-block; width:4px; height:14px; border-radius:1px; margin-right:6px; vertical-align:-2px }
table {
  width:100%; border-collapse:separate; border-spacing:0; background:var(--card); border:1px solid var(--line);
  border-radius:10px;
}
th { font-size:12.5px; font-weight:600; color:var(--soft); text-align:left; padding:10px 12px; white-space:nowrap }
td { padding:9px 12px; border-top:1px solid var(--line); vertical-align:top; font-variant-numeric:tabular-nums }
.name { font-weight:600; overflow-wrap:anywhere }
.badge {
  display:inline-block; white-space:nowrap; border-radius:999px; padding:1px 10px 1px 8px; font-size:13px;
  font-weight:600; background:var(--softbg); color:var(--soft);
}
.badge.good { background:var(--goodbg); color:var(--good) }
.badge.late { background:var(--latebg); color:var(--late) }
.badge.bad { background:var(--badbg); color:var(--bad) }
svg { display:block; overflow:visible }
.timeline { width:252px; height:26px }
.sizes { width:64px; height:26px }
svg .full { fill:var(--full) }
svg .inc { fill:var(--inc) }
svg .lost { fill:var(--bad) }
svg .week { stroke:var(--line) }
svg .chain { stroke:var(--inc); stroke-width:1.5 }
.pair { display:flex; gap:10px; align-items:flex-start }
.pair svg { flex:none }
.pair div { white-space:nowrap }
.badtext { color:var(--bad) }
.latetext { color:var(--late) }
details { margin-top:2px }
summary { cursor:pointer; color:var(--soft); font-size:13px }
ul { margin:6px 0 0; padding-left:18px }
li { font-size:13px; overflow-wrap:anywhere; margin:2px 0 }
.note { background:var(--badbg); color:var(--bad); border-radius:10px; padding:10px 14px; margin:12px 0 }
@media(max-width:900px) {
  main { padding:16px 12px 40px }
  table,tbody,td { display:block }
  thead { display:none }
  table { background:none; border:0 }
  tr {
    display:grid; grid-template-columns:1fr 1fr; background:var(--card); border:1px solid var(--line); border-radius:10px;
    margin-bottom:10px; padding:6px 0;
  }
  td { border:0; padding:4px 14px; min-width:0 }
  td:nth-child(1),td:nth-child(2),td:nth-child(3),td:nth-child(4) { grid-column:1/-1 }
  td[data-label]::before { content:attr(data-label); display:block; font-size:12px; color:var(--soft) }
  .timeline { width:100%; max-width:420px; height:auto }
  .tiles { grid-template-columns:repeat(3,minmax(0,1fr)); gap:8px }
  .tile { padding:8px 10px }
  .tile b { font-size:20px }
}
@media(max-width:360px) {
  .tiles { grid-template-columns:repeat(2,minmax(0,1fr)) }
}
@media print {
  body { background:none }
  tr { break-inside:avoid }
}
"""
