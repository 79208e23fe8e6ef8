"""The report's style sheet: one column, light and dark, narrow screens and paper."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--ground:#fff;--raised:#f6f8fa;--line:#d0d7de;
 --accent:#0969da;--yes:#00664b;--no:#a8320a;--open:#5c5f66;
 --line0:#0072b2;--line1:#c04f00;--line2:#00805d;--line3:#a8487f;--line4:#8a6a00;--line5:#2b8fc4}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--ground:#0d1117;--raised:#161b22;
 --line:#3d444d;--accent:#6cb6ff;--yes:#3fd0a4;--no:#ff9366;--open:#b4bac2;
 --line0:#56b4e9;--line1:#ff9a4d;--line2:#2fc49a;--line3:#e39ac3;--line4:#f0e442;--line5:#9ecbff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:0 0 .25rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p,ul.notes{max-width:44rem}
a{color:var(--accent)}
code{font:.9em ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
small,.soft{color:var(--soft)}
.how{max-width:44rem;margin:1rem 0;padding:.75rem 1rem;border:1px solid var(--line);border-radius:8px;
 background:var(--raised)}
.how h2{font-size:1rem}
.how p{margin:.35rem 0}
.how ul{margin:.35rem 0;padding:0;list-style:none}
.scroll{overflow-x:auto;max-width:100%}
.scroll code{white-space:nowrap}
.scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;font-size:.875rem}
th,td{padding:.4rem .9rem .4rem 0;text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--line);color:var(--soft);font-weight:600;vertical-align:bottom}
.scroll thead th{white-space:nowrap}
tbody tr{border-bottom:1px solid var(--line)}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll td{white-space:nowrap;padding-top:.2rem;padding-bottom:.2rem}
.figures td{white-space:normal}
.figures td:first-child{min-width:9rem}
.figures td:nth-child(2),.figures td:last-child{min-width:7.5rem}
.summary{width:100%}
.summary tbody{border-bottom:2px solid var(--line)}
.summary tbody tr:last-child{border-bottom:0}
.summary .claim{max-width:22rem}
.summary .paper{font-weight:600}
.value{font-variant-numeric:tabular-nums;white-space:nowrap}
.verdict{display:inline-block;font-weight:600;font-size:.8125rem;line-height:1.35}
.verdict.yes{color:var(--yes)}.verdict.no{color:var(--no)}.verdict.open{color:var(--open)}
.badge{display:inline-block;padding:0 .5rem;border:1px solid currentColor;border-radius:1rem;font-size:.75rem;
 font-weight:600;color:var(--soft);white-space:nowrap}
section{margin-top:2.5rem;padding-top:1.5rem;border-top:1px solid var(--line)}
svg{display:block;overflow:visible}
svg path{fill:none;stroke:currentColor}
svg .axis{stroke:var(--soft)}
svg .grid{stroke:var(--line);stroke-width:.7}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.interval{width:140px;height:24px}
.interval .axis{stroke:var(--line)}
.interval .threshold{stroke:var(--line1);stroke-width:1.5;stroke-dasharray:3 2}
.interval .bar{stroke-width:2}
.interval .dot{fill:currentColor}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}
.chart{margin:0;max-width:32rem;break-inside:avoid}
.chart figcaption{font-weight:600;font-size:.9rem;margin-bottom:.25rem}
.chart>svg{width:100%;height:auto}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.25rem 0 0;padding:0;list-style:none;font-size:.8125rem}
.key li{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere}
.key svg{width:30px;height:10px;flex:none}
g[class^=line] path{stroke-width:1.8;stroke-linejoin:round}
.band{stroke:none;opacity:.18}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) minmax(0,1fr);gap:.15rem 1rem;margin:0;
 font-size:.875rem}
dt{color:var(--soft);overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere}
.conditions{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 2rem}
@media (max-width:56rem){
 .summary,.summary tbody,.summary tr,.summary td{display:block}
 .summary thead{display:none}
 .summary tbody{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem;margin-bottom:1rem}
 .summary td{padding:.15rem 0}
 .summary td:empty{display:none}
 .summary tbody tr{padding:.5rem 0}
 .summary .claim{max-width:none;padding-bottom:.4rem}
 .summary td[data-label]::before{content:attr(data-label) ": ";color:var(--soft)}
}
@media print{body{max-width:none;padding:0;font-size:10pt}.scroll{overflow:visible}
 .scroll td,.scroll thead th{white-space:normal}tr,.chart{break-inside:avoid}h2,h3{break-after:avoid}
 svg,.verdict{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
""" + "\n".join(
    f".line{place}{{color:var(--line{place})}}.line{place} path{{stroke-dasharray:{dashes}}}"
    f".line{place} circle,.band.line{place}{{fill:var(--line{place})}}"
    for place, dashes in enumerate(("none", "6 3", "2 2.5", "9 3 2 3", "1 4", "12 4"))
)
