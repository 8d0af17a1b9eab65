"""The report's style sheet: system fonts, one column on a phone, two on a laptop, light and dark."""

CSS = """
:root{--page:#f6f5f2;--card:#fff;--ink:#1c1e22;--muted:#6a6f78;--line:#e4e2dc;--first:#2b62c9;
--second:#d9730d;
--mark:#a3a09a;--good:#1d7a46;--open:#8a5a00;--bad:#b3261e;--hl:#fdf0d3}
@media(prefers-color-scheme:dark){:root{--page:#111316;--card:#191c20;--ink:#e7e8ea;--muted:#969ca6;
--line:#2c3037;
--first:#6fa3ff;--second:#f5a04a;--mark:#6d737d;--good:#5cc98d;--open:#e3b341;--bad:#ff8a80;--hl:#3a3220}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);-webkit-text-size-adjust:100%;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:2.5rem clamp(1rem,4vw,2.5rem) 3rem}
.eyebrow,footer,.note,.empty{color:var(--muted);font-size:.85rem;margin:0}
h1{font-size:clamp(1.7rem,5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:.2rem 0 .6rem;
overflow-wrap:anywhere}
.lead{font-size:1.08rem;max-width:46rem;margin:0 0 .9rem}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:2.6rem 0 .9rem}
h3{font-size:.95rem;font-weight:600;margin:0}
.badge{display:inline-block;border:1px solid;border-radius:1rem;padding:.1rem .8rem;font-size:.85rem;
font-weight:600}
.good{color:var(--good)}.open{color:var(--open)}.bad{color:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(11.5rem,46%),1fr));gap:1px;
margin:1.6rem 0 0;
overflow:hidden;background:var(--card);border:1px solid var(--line);border-radius:.7rem}
.figures div{padding:.8rem 1rem;box-shadow:0 0 0 1px var(--line);display:flex;flex-direction:column;
justify-content:space-between}
dt{color:var(--muted);font-size:.8rem;line-height:1.35}
dd{margin:.25rem 0 0;font-size:1.3rem;font-weight:600;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.7rem;
padding:.9rem 1rem .5rem;
min-width:0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;margin-bottom:.4rem}
figcaption p{display:flex;flex-wrap:wrap;gap:0 .9rem;margin:0;color:var(--muted);font-size:.8rem}
figcaption i{display:inline-block;width:.9rem;height:3px;border-radius:2px;margin-right:.35rem;
vertical-align:middle}
i.dashed{height:0;border-top:2px dashed var(--mark);border-radius:0}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
.sample{background:var(--card);border:1px solid var(--line);border-radius:.7rem;margin-bottom:1rem;
max-height:26rem;overflow:auto}
.sample div{display:grid;grid-template-columns:6.5rem 1fr;gap:0 1rem;padding:.8rem 1rem}
.sample div+div{border-top:1px solid var(--line)}
.sample b{color:var(--muted);font-size:.8rem;font-weight:500;padding-top:.2rem}
.medium{display:inline-flex;flex-direction:column;align-items:center;margin:.1rem .3rem .1rem .9rem;
vertical-align:top}
.medium img{width:6rem;height:6rem;object-fit:contain;image-rendering:pixelated;border-radius:.3rem}
.medium audio{width:15rem;height:2.4rem}.sample small{color:var(--muted)}
.sample p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
mark{background:var(--hl);color:inherit;border-radius:.2rem}
.scroll{overflow:auto;background:var(--card);border:1px solid var(--line);border-radius:.7rem;
max-height:26rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.45rem 1rem;overflow-wrap:anywhere;vertical-align:top}
th{color:var(--muted);font-weight:500;font-size:.8rem;white-space:nowrap}
td:first-child{white-space:nowrap}
tbody tr{border-top:1px solid var(--line)}
details{background:var(--card);border:1px solid var(--line);border-radius:.7rem;margin-bottom:.6rem}
summary{cursor:pointer;padding:.6rem 1rem;font-weight:500}
details .scroll{border-width:1px 0 0;border-radius:0 0 .7rem .7rem}
pre{margin:0;padding:.9rem 1rem;border-top:1px solid var(--line);overflow:auto;
font:.83rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:2.6rem}
@media(max-width:34rem){svg text{font-size:13px!important}
.sample div{grid-template-columns:1fr}figure{padding:.8rem .6rem .3rem}}
.bar{display:flex;height:1.1rem;border-radius:.35rem;overflow:hidden;margin-bottom:.7rem;background:var(--line)}
.bar i{min-width:1px}
table.time i{display:inline-block;width:.7rem;height:.7rem;border-radius:.15rem;margin-right:.6rem}
table.time td:nth-child(n+2){text-align:right;white-space:nowrap}
i.training{background:#2a8a57}i.data{background:#2b62c9}i.save{background:#6f9cf0}i.eval{background:#8e6bd0}
i.start{background:#c9a227}i.first{background:#e2c65a}i.again{background:#d9730d}i.skipped{background:#b3261e}
i.down{background:#7b3a3a}i.other{background:var(--mark)}
"""
