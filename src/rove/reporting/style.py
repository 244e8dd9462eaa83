"""The report page's style sheet: light and dark, desktop and phone."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1b1d22; --soft: #5d636e; --rule: #e3e4e8;
  --before: #8a6d1f; --after: #1f5fd0; --rollout: #5b8def;
  --pass: #1c7f45; --fail: #b93244;
  --part-simulation: #3b7dd8; --part-inference: #9a5fd0; --part-training: #2f9e6e;
  --part-sync: #d9a21b; --part-evaluation: #d9683b; --part-checkpoint: #5f9ea8; --part-other: #a8adb7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131519; --card: #1b1e24; --ink: #e8eaee; --soft: #9aa1ad; --rule: #2d313a;
    --before: #d8b75c; --after: #6ea3ff; --rollout: #5b8def;
    --pass: #52c483; --fail: #f0717f;
    --part-simulation: #4f8fe6; --part-inference: #ab77dd; --part-training: #3fb181;
    --part-sync: #dfb03a; --part-evaluation: #e07f55; --part-checkpoint: #73b3bd; --part-other: #6b717d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 4px; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 4px 0 12px; }
.soft, figcaption, .note { color: var(--soft); }
.note { font-size: 13px; max-width: 100ch; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 8px 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; overflow-x: auto; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px;
  margin: 20px 0 12px; }
.numbers b { display: block; font-size: 36px; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em; }
.numbers .card > span { display: block; }
.difference { font-size: 16px; margin: 4px 0; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft);
  margin: 6px 0 10px; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--soft); stroke-width: 1; opacity: 0.25; }
svg .frame { fill: none; stroke: var(--rule); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .bar { stroke-width: 2; }
svg .hover { fill: transparent; }
svg .hover:hover { fill: var(--soft); opacity: 0.12; }
.narrow { display: none; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; font-size: 13px; color: var(--soft); text-align: right; padding: 4px 10px;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { padding: 5px 10px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
td small { color: var(--soft); font-size: 12px; }
td.scale-cell { width: 34%; padding-right: 0; }
th.ends { padding-right: 0; font-weight: 400; font-size: 12px; }
th.ends span:last-child { float: right; } th.ends span:first-child { float: left; }
tr.group td { padding-top: 12px; }
tr.group td:first-child { font-weight: 600; }
tr.member td:first-child { padding-left: 16px; }
.scale { position: relative; display: block; height: 9px; border-left: 1px solid var(--rule);
  border-right: 1px solid var(--rule);
  background: linear-gradient(var(--rule), var(--rule)) center / 100% 1px no-repeat; }
.scale i { position: absolute; top: 2.5px; height: 4px; border-radius: 2px; opacity: 0.5; }
.scale i.dot { top: 0; width: 9px; height: 9px; margin-left: -4.5px; border-radius: 50%; opacity: 1; }
.episodes { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 12px; }
.episode p { margin: 0 0 8px; font-weight: 600; }
.episode div { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
figure { margin: 0; }
/* The page says in text what the strip below the picture says: show the picture alone. */
figure img { display: block; width: 100%; border-radius: 6px; aspect-ratio: 1; object-fit: cover;
  object-position: top; }
figcaption { font-size: 13px; margin-top: 4px; }
.pass { color: var(--pass); } .fail { color: var(--fail); }
details { margin-top: 12px; border-top: 1px solid var(--rule); }
summary { cursor: pointer; font-size: 18px; font-weight: 600; padding: 12px 0; }
.metrics { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px; }
.metrics .card { padding: 10px 12px; }
.metrics p { margin: 0; font-size: 12.5px; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0 0 12px;
  font-size: 13.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 20px 14px 48px; }
  h1 { font-size: 24px; }
  .wide { display: none; } .narrow { display: block; }
  .card { padding: 12px; }
  .numbers { gap: 8px; } .numbers b { font-size: 30px; }
  .episodes { grid-template-columns: 1fr; }
  table, tbody { display: block; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 0 8px;
    border-top: 1px solid var(--rule); padding: 7px 0; }
  td, tr.group td, tr.member td:first-child { border: 0; padding: 0; text-align: left; }
  td:first-child, td.scale-cell { grid-column: 1 / -1; width: auto; }
  tr td.scale-cell:last-child { padding-top: 6px; }
  tr.member { padding-left: 12px; }
  td small { display: block; }
  td[data-name]::before { content: attr(data-name); display: block; font-size: 12px; color: var(--key); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
}
"""
