"""The page's style sheet and script: no network, light and dark, from a phone to a wide screen."""

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5b6675;--line:#e2e6ec;--grid:#e9ecf1;
--good:#0a7d4f;--bad:#b3261e;--warn:#9a5b00;--chip:#eef1f6;
--c0:#2563eb;--c1:#e07b00;--c2:#0f9d76;--c3:#c2338f;--c4:#7c5cd6;--c5:#a3701c;--c6:#3aa0d8;--c7:#808b99}
@media(prefers-color-scheme:dark){:root{--bg:#10141b;--card:#181e27;--ink:#e6eaf0;--soft:#97a3b3;--line:#2a323e;
--grid:#252d39;--good:#4ccb93;--bad:#ff8a80;--warn:#f0b35a;--chip:#232b37;
--c0:#6ea0ff;--c1:#ffa94d;--c2:#4fd1a5;--c3:#f27cc4;--c4:#b39dff;--c5:#d9ab62;--c6:#79c8f2;--c7:#9aa6b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main,header.top,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header.top{padding-top:32px}
h1{font-size:1.55rem;line-height:1.25;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:1.12rem;margin:36px 0 12px;letter-spacing:-.005em}
h3{font-size:.93rem;margin:0}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:16px 0 0;font-size:.88rem}
a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}
.name{display:flex;flex-wrap:wrap;align-items:center;gap:8px 12px}
.state{font-size:.78rem;font-weight:600;padding:2px 10px;border-radius:99px;background:var(--chip)}
.state.done{color:var(--good)}.state.stopped{color:var(--warn)}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;margin:14px 0 0;font-size:.9rem}
dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:22px 0 0}
.tile,.card,figure.chart{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:13px 16px}.tile .label{color:var(--soft);font-size:.82rem}
.tile .value{font-size:1.42rem;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;line-height:1.3}
.tile .more{font-size:.82rem;color:var(--soft)}
.up{color:var(--good);font-weight:600}.down{color:var(--bad);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,470px),1fr));gap:14px}
figure.chart{margin:0;padding:14px 16px 8px;min-width:0}
figcaption p{margin:1px 0 0;color:var(--soft);font-size:.82rem;line-height:1.4}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:7px 0 2px;padding:0;font-size:.8rem}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--c)}
.plot{position:relative}svg{display:block;width:100%;height:auto;overflow:visible}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}
rect.bar{fill:var(--c);stroke:var(--card);stroke-width:.6}.pale{opacity:.45}
path.line{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
path.raw{stroke-width:1;opacity:.32}
path.band{fill:var(--c);opacity:.16}path.area{fill:var(--c);opacity:.82}circle{fill:var(--c)}
path.shade,rect.shade{fill:var(--c0);shape-rendering:crispEdges}rect.frame{fill:none;stroke:var(--grid)}
rect.cell{fill:none;stroke:var(--ink);stroke-width:1.2;visibility:hidden}
p.legend{align-items:center;gap:8px}svg.shades{width:144px;height:10px;flex:none}
text.reference{paint-order:stroke;stroke:var(--card);stroke-width:3px}
line.whisker{stroke:var(--c);stroke-width:2}text.name{font-size:11.5px}
line.grid{stroke:var(--grid);stroke-width:1}line.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}
line.reference{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4}
text{font:11px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft)}
text.tick{font-variant-numeric:tabular-nums}text.axis,text.reference{font-size:10.5px}
.tip{position:absolute;top:4px;pointer-events:none;background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:6px 10px;font-size:.78rem;line-height:1.45;box-shadow:0 4px 14px #0003;
white-space:nowrap;z-index:2;font-variant-numeric:tabular-nums}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,470px),1fr));gap:14px}
.card{padding:13px 16px;min-width:0}
.card header{display:flex;flex-wrap:wrap;gap:4px 12px;font-size:.82rem;color:var(--soft)}
.right{color:var(--good);font-weight:650}.wrong{color:var(--bad);font-weight:650}
.card .role{font-size:.74rem;font-weight:600;color:var(--soft);margin:9px 0 2px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;max-height:17em;overflow:auto;background:var(--bg);border-radius:6px;padding:7px 10px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 18px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right}
h3.table{margin:20px 0 8px}.wide table{width:auto;font-size:.8rem}.wide td{white-space:nowrap}
.card ul{margin:0;padding-left:1.1em}.card li{margin:4px 0}.card p{color:var(--soft);font-size:.85rem;margin:10px 0 0}
th{color:var(--soft);font-weight:600}tr:last-child td{border-bottom:0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:14px;align-items:start}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
details pre{max-height:40em;margin-top:8px}
.notice{border-left:3px solid var(--warn);background:var(--card);padding:9px 14px;border-radius:0 8px 8px 0;
margin:18px 0 0;font-size:.9rem}
footer{color:var(--soft);font-size:.82rem;padding-top:30px;padding-bottom:40px}
@media(max-width:600px){main,header.top,footer{padding-left:12px;padding-right:12px}text{font-size:17px}
text.axis{display:none}path.line{stroke-width:2.6}}
@media print{figure.chart,.tile,.card{break-inside:avoid}body{background:#fff}}
"""

SCRIPT = """
for (const figure of document.querySelectorAll('figure[data-heat]')) {
  const data = JSON.parse(figure.dataset.heat), plot = figure.querySelector('.plot');
  const svg = plot.querySelector('svg'), tip = plot.querySelector('.tip'), cell = svg.querySelector('.cell');
  const [x0, y0, x1, y1] = data.box, width = (x1 - x0) / data.columns.length, height = (y1 - y0) / data.rows.length;
  const hide = () => { tip.hidden = true; cell.style.visibility = 'hidden'; };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = data.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * scale - x0) / width);
    const row = Math.floor(((event.clientY - box.top) * scale - y0) / height);
    const value = (data.values[row] || [])[column];
    if (value === undefined || value === null) return hide();
    tip.textContent = `${data.row} ${data.rows[row]}, ${data.x} ${data.columns[column]}: ${value}`;
    Object.entries({x: x0 + column * width, y: y0 + row * height, width, height})
      .forEach(([name, number]) => cell.setAttribute(name, number));
    cell.style.visibility = 'visible';
    tip.hidden = false;
    const left = (x0 + column * width) / scale;
    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 12 : left + width / scale + 12) + 'px';
  });
  svg.addEventListener('pointerleave', hide);
}
for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const data = JSON.parse(figure.dataset.chart), plot = figure.querySelector('.plot');
  const svg = plot.querySelector('svg'), tip = plot.querySelector('.tip'), cursor = svg.querySelector('.cursor');
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a);
  const hide = () => { tip.hidden = true; cursor.style.visibility = 'hidden'; };
  const move = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * data.width;
    const found = data.series.map(s => nearest(s.points, x));
    const at = found.reduce((a, b) => Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a);
    cursor.setAttribute('x1', at[1]); cursor.setAttribute('x2', at[1]); cursor.style.visibility = 'visible';
    tip.replaceChildren(Object.assign(document.createElement('div'), {textContent: data.x + ' ' + at[0]}));
    found.forEach((p, i) => {
      if (p[0] !== at[0]) return;
      const row = document.createElement('div'), key = document.createElement('span');
      key.className = 'key c' + i % 8;
      row.append(key, data.series[i].name + '  ' + p[3]);
      tip.append(row);
    });
    tip.hidden = false;
    const left = at[1] / data.width * box.width;
    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 12 : left + 12) + 'px';
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerleave', hide);
}
"""
