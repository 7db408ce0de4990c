# SPDX-License-Identifier: Apache-2.0
"""How a report looks: light or dark as the reader's system is, narrow or wide, on a screen or on paper.

The colours of series are Okabe and Ito's, which colour-blind readers tell apart; in the dark the same hues, lighter.
Charts are drawn for a width of 560 and scale with the page, so on a narrow screen their letters grow again.
"""

from __future__ import annotations

_LIGHT = """
--page: #ffffff; --ink: #1c2127; --soft: #5b6673; --line: #d9dee4; --faint: #eef1f4; --card: #f7f8fa;
--link: #0b5cad; --bad: #b3261e; --bad-page: #fdeeec; --warn: #8a5a00; --warn-page: #fdf4e0; --good: #1a7f4b;
--s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --s5: #56b4e9;
"""
_DARK = """
--page: #14181d; --ink: #e6eaee; --soft: #9aa6b2; --line: #36404a; --faint: #242b33; --card: #1b2128;
--link: #7cb7f2; --bad: #ff8a80; --bad-page: #3a1c1c; --warn: #f2c464; --warn-page: #33290f; --good: #5fd39a;
--s0: #56b4e9; --s1: #f5924e; --s2: #2fc299; --s3: #dd9bc1; --s4: #f0be55; --s5: #8fb3ff;
"""

STYLE = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1220px; padding: 28px 24px 48px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; padding-bottom: 6px; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 0 0 6px; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: 10px 0; max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: .94rem; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.subtitle { margin: 4px 0 0; color: var(--soft); }
.note, footer { color: var(--soft); font-size: .9rem; }
.warning, .failure { max-width: none; white-space: pre-line; }
.warning, .failure { padding: 10px 14px; border-left: 4px solid; border-radius: 4px; }
.warning { border-color: var(--warn); background: var(--warn-page); }
.failure { border-color: var(--bad); background: var(--bad-page); }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid var(--line); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tiles > div { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.tiles dt { color: var(--soft); font-size: .86rem; }
.tiles dd { margin: 2px 0 0; font-size: 1.4rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; color: var(--soft); font-size: .82rem; font-weight: 400; line-height: 1.4; }

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 26px 32px;
  margin-top: 16px; }
.cards { columns: 3 300px; column-gap: 16px; }
.card { break-inside: avoid; margin: 0 0 16px; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
.card dl { margin: 0; font-size: .92rem; }
.card dt { color: var(--soft); }
.card dd { margin: 0; overflow-wrap: anywhere; }
.pairs { display: grid; grid-template-columns: minmax(0, auto) minmax(0, 1fr); gap: 1px 14px; }
.pairs dd { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .86rem;
  line-height: 1.7; }
.sample dl { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: 4px 14px; }
.sample dd { max-height: 16em; overflow-y: auto; white-space: pre-wrap; }
.sample em { color: var(--soft); }

.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 6px; text-align: left; font-weight: 600; }
th, td { padding: 6px 20px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-size: .88rem; font-weight: 500; }
tbody th { font-weight: 400; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers :is(th, td):last-child { padding-right: 4px; }
.numbers th { white-space: nowrap; }
.words td { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--link); }

figure { margin: 0; break-inside: avoid; min-width: 0; }
.tall { grid-row: span 2; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 4px; }
figcaption b { font-weight: 600; }
.key { color: var(--soft); font-size: .88rem; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.key svg { display: inline-block; width: 26px; height: 12px; margin-right: 5px; vertical-align: -1px; }
svg text { fill: var(--soft); font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); }
.rule { stroke: var(--line); stroke-width: 1; } .zero { stroke: var(--soft); stroke-width: 1; }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.thin { stroke-width: 1; stroke-opacity: .45; }
.dash { stroke-dasharray: 6 4; }
.mark { stroke: var(--page); stroke-width: 1.5; }
.gap { fill: var(--bad); fill-opacity: .16; } svg .gone { fill: var(--bad); font-weight: 700; }
.over { fill-opacity: .45; }
.limit { stroke: var(--ink); stroke-width: 2; }
.level { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; }
.spot { fill: var(--ink); fill-opacity: 0; } .spot:hover { fill-opacity: .09; }
.bar:hover { fill-opacity: .75; }
"""
    + "".join(f".f{i} {{ fill: var(--s{i}); }} .l{i} {{ stroke: var(--s{i}); }}\n" for i in range(6))
    + """
@media (max-width: 620px) {
  body { padding: 18px 14px 32px; } h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } .tiles dd { font-size: 1.15rem; }
  .numbers tbody th { min-width: 9ch; white-space: normal; } th, td { padding-right: 12px; }
  svg text { font-size: 17px; } .sample dl { grid-template-columns: minmax(0, 1fr); } .sample dd { margin-bottom: 6px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav, summary { display: none; } a { color: inherit; }
  .card, tr, .tiles > div { break-inside: avoid; } h2, h3 { break-after: avoid; } h2 { margin-top: 26px; }
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); } .grid:has(.numbers) { grid-template-columns: 1fr; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
