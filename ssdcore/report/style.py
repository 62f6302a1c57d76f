"""The style of the report, for wide and narrow windows, in light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f5f6f8; --text: #1b1f24; --faint: #5c6570; --line: #d6dae0; --shade: 37, 99, 235;
  --s0: #2563eb; --s1: #c2410c; --s2: #15803d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1e2228; --text: #e6e9ed; --faint: #9aa4b0; --line: #363c45; --shade: 96, 165, 250;
    --s0: #60a5fa; --s1: #fb923c; --s2: #4ade80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem;
  background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0 1rem; max-width: 46rem; color: var(--faint); overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; }
nav a { color: var(--s0); }
figure { margin: 0; min-width: 0; }
.cards, .charts, .mistakes { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; }
.cards div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.cards span { color: var(--faint); font-size: .875rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.mistakes { grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); }
.chart, .mistake { background: var(--panel); border-radius: .5rem; padding: .75rem; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--faint); font-size: 11px; font-family: system-ui, sans-serif; }
.chart .grid { stroke: var(--line); }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key { white-space: nowrap; }
.key i {
  display: inline-block; width: 1.2rem; margin-right: .35rem; vertical-align: middle;
  border-width: 3px 0 0; border-style: solid;
}
.s0 { stroke: var(--s0); border-color: var(--s0); }
.s1 { stroke: var(--s1); border-color: var(--s1); stroke-dasharray: 7 3; }
.s2 { stroke: var(--s2); border-color: var(--s2); stroke-dasharray: 2 3; }
circle.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); }
.key .s1 { border-top-style: dashed; } .key .s2 { border-top-style: dotted; }
.mistake figcaption { font-size: .9rem; margin-bottom: .5rem; overflow-wrap: anywhere; }
.mistake figcaption span { display: block; color: var(--faint); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .5rem; }
.pair div { font-size: .8rem; color: var(--faint); }
.pair img { display: block; width: 100%; height: auto; border-radius: .25rem; }
summary { cursor: pointer; padding: .75rem 0; color: var(--s0); }
.scroll { /* the second gradient, a shadow, shows where a table goes on to the right; the first covers it at the end */
  overflow-x: auto;
  background:
    linear-gradient(270deg, var(--page) 1rem, transparent) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--line), transparent) 100% 0 / .75rem 100% no-repeat scroll;
}
.charts + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 500; }
tbody tr[aria-current] > * { background: rgba(var(--shade), .2); }
.settings th, .settings td { vertical-align: top; text-align: left; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
.confusion td { text-align: center; background: rgba(var(--shade), calc(.75 * var(--share, 0))); }
.confusion thead th { text-align: center; }
.bar { display: block; height: .7rem; background: var(--s0); border-radius: .2rem; min-width: 1px; }
.speed td:last-child { width: 100%; min-width: 6rem; }
@media (max-width: 34rem) { th, td { padding: .3rem .45rem; } }
"""
