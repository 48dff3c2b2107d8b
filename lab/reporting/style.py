"""The page's style: dark and light, from a phone to a wide screen."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2328; --soft: #5c6670; --line: #dfe3e7; --back: #fff; --card: #f6f7f9;
  --mark: #0b63a5; --good: #00734f; --bad: #b3380c; --rest: #b4bac0;
  --k0: #0072b2; --k1: #d55e00; --k2: #009e73; --k3: #b8608f; --k4: #b87d00; --k5: #3a9fd6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --soft: #a0abb5; --line: #343c43; --back: #14181c; --card: #1c2227;
    --mark: #6cb8ef; --good: #4cc79c; --bad: #f49166; --rest: #59636c;
    --k0: #4ba6e0; --k1: #f0803c; --k2: #2fc39a; --k3: #dd92bb; --k4: #e6a936; --k5: #8ccdf2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 3rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.4rem 0 .3rem; }
summary { cursor: pointer; }
p { max-width: 48rem; margin: .6rem 0; }
.lead { font-size: 1.12rem; font-weight: 600; }
.said { max-width: 50rem; margin: .4rem 0; padding-left: 1.2rem; }
.soft, .note { color: var(--soft); font-size: .87rem; }
.chips, .legend { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.chips li { background: var(--card); border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .75rem;
  font-size: .87rem; }
.legend { gap: .1rem 1.2rem; margin: .3rem 0; font-size: .82rem; }
.legend svg { width: 2.2rem; height: .8rem; vertical-align: middle; margin-right: .3rem; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-items: end; margin: 1.2rem 0 .4rem; }
.filters label { display: grid; font-size: .78rem; color: var(--soft); max-width: 100%; }
.filters input, .filters select, .filters button, .tabs button { font: inherit; font-size: .9rem; color: var(--ink);
  background: var(--back); border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .5rem; max-width: 100%; }
.filters input { width: 16rem; }
.filters select { max-width: 12rem; }
.tabs button { cursor: pointer; margin: 0 .4rem .4rem 0; }
.tabs button[aria-pressed=true] { background: var(--card); border-color: var(--mark); }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; max-height: 44rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); background: var(--back); }
tbody tr:last-child > * { border-bottom: 0; }
th, tbody tr:hover > * { background: var(--card); }
th { font-weight: 600; }
thead th { position: sticky; top: 0; z-index: 2; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, svg:focus-visible, .box:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--mark); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--mark); }
.word { text-align: left; }
.long { white-space: normal; min-width: 15rem; max-width: 26rem; overflow-wrap: break-word; }
.stay { position: sticky; left: 0; z-index: 1; border-right: 1px solid var(--line); }
thead th.stay { z-index: 3; }
tr.baseline td { font-weight: 600; }
tr.open td { color: var(--soft); }
.good, .done { color: var(--good); }
.bad, .diverged, .failed { color: var(--bad); }
figure { margin: .6rem 0; overflow-x: auto; }
figure > svg { display: block; width: 100%; height: auto; max-width: 60rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .8rem; }
.panels figure { margin: 0; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .s { fill: var(--soft); }
svg .e { text-anchor: end; }
svg .c { text-anchor: middle; }
svg .g { stroke: var(--line); }
svg .a { stroke: var(--soft); }
svg polyline { fill: none; stroke-linejoin: round; }
svg .m { cursor: default; }
svg .m.at { stroke: var(--ink); stroke-width: 2.5; }
svg .hit { fill: transparent; stroke: none; }
svg .off { opacity: .08; }
.k0 { --c: var(--k0); } .k1 { --c: var(--k1); } .k2 { --c: var(--k2); } .k3 { --c: var(--k3); } .k4 { --c: var(--k4); }
.k5 { --c: var(--k5); } .kr { --c: var(--ink); } .kx { --c: var(--rest); }
.f { fill: var(--c); } .l { stroke: var(--c); } .h { fill: var(--back); stroke: var(--c); stroke-width: 2; }
.band { fill: var(--c); opacity: .14; }
#tip { position: fixed; z-index: 9; max-width: min(24rem, 90vw); padding: .4rem .6rem; border-radius: .4rem;
  background: var(--ink); color: var(--back); font-size: .82rem; line-height: 1.35; white-space: pre-line;
  pointer-events: none; left: 0; top: 0; }
[hidden] { display: none !important; }
pre { margin: 0; max-width: 44rem; max-height: 16rem; overflow: auto; white-space: pre-wrap; text-align: left;
  font-size: .8rem; }
@media (max-width: 40rem) {
  body { padding: 1.1rem .8rem 2rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .38rem .5rem; }
  .long { min-width: 8rem; max-width: 14rem; }
  .stay { max-width: 10rem; }
  .filters input { width: 100%; }
  figure.wide > svg { min-width: 40rem; }
}
@media print { .box { overflow: visible; max-height: none; } .filters, .tabs button { display: none; } }
"""
