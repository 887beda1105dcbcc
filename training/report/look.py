"""Style and script of the page. No fonts, images or code from anywhere else."""

LIGHT = ["#0069a8", "#d97a00", "#008a63", "#c0392b", "#8e4ec6", "#2aa7d6", "#7a7a12", "#777e88"]
DARK = ["#4fb3ff", "#ffb14d", "#3fcf9f", "#ff7f6e", "#c79bff", "#7fdcff", "#d6d65c", "#a4abb6"]


def _palette(colors: list[str]) -> str:
    return "".join(f"--c{index}:{color};" for index, color in enumerate(colors))


_CLASSES = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(len(LIGHT)))

STYLE = f"""
:root{{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#5b6470;
--grid:#e3e6ea;--low:#2166ac;--mid:#eef0f2;--high:#c0391b;--idle:#7b2cbf;{_palette(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#111418;--card:#1a1e24;--ink:#e8ebef;
--soft:#9aa4b1;--grid:#2c323a;--low:#4a9be8;--mid:#2b3037;--high:#ff7a52;--idle:#b26bff;
{_palette(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
main{{max-width:1240px;margin:0 auto;padding:20px 16px 48px}}
h1{{font-size:1.6rem;margin:0 0 2px}} h2{{font-size:1.15rem;margin:28px 0 10px}}
h3{{font-size:.95rem;margin:0 0 4px}}
.note{{color:var(--soft);margin:2px 0 8px;font-size:.86rem}}
.warn{{border-left:4px solid var(--c1);padding:6px 10px;background:var(--card)}}
.facts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px;
margin:14px 0}}
.facts div{{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:8px 12px}}
.facts dt{{color:var(--soft);font-size:.8rem}}
.facts dd{{margin:0;font-weight:600;overflow-wrap:anywhere}}
.facts small{{display:block;font-weight:400;color:var(--soft);font-size:.8rem}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));gap:12px}}
figure{{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:8px;
padding:12px 12px 8px;min-width:0;display:flex;flex-direction:column}}
svg{{display:block;width:100%;height:auto;margin-top:auto}}
.legend{{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:0 0 6px;padding:0;
font-size:.82rem;color:var(--soft)}}
.legend b{{color:var(--ink);font-weight:600}}
.key{{display:inline-block;width:10px;height:10px;border-radius:2px;background:var(--c);
margin-right:5px}}
.key.idle{{background:var(--idle)}}
{_CLASSES}
.line{{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}}
.faint{{stroke-width:1;opacity:.35}} .dot{{fill:var(--c)}}
.area{{fill:var(--c)}} .edge{{fill:none;stroke:var(--card);stroke-width:.6}}
.grid{{stroke:var(--grid)}} .mark{{stroke:var(--soft);stroke-dasharray:3 3}}
.cursor{{stroke:var(--soft);stroke-width:.8}}
text{{font-size:11px;fill:var(--soft)}} .end{{text-anchor:end}} .mid{{text-anchor:middle}}
.unit{{color:var(--soft);font-size:.8rem}} svg .unit{{font-size:11px}}
.tip{{position:fixed;pointer-events:none;background:var(--ink);color:var(--page);z-index:9;
padding:4px 8px;border-radius:6px;font-size:.78rem;line-height:1.35;display:none;white-space:pre}}
.scale{{display:flex;flex-wrap:wrap;align-items:center;gap:4px 8px;font-size:.82rem;
color:var(--soft);margin-bottom:8px}}
.ramp{{width:130px;height:12px;border-radius:3px;
background:linear-gradient(90deg,var(--low),var(--mid),var(--high))}}
.heat{{display:grid;grid-template-columns:26px 1fr;gap:2px 6px}}
.heat canvas{{width:100%;image-rendering:pixelated;border-radius:4px;background:var(--mid)}}
.rows,.columns{{position:relative;font-size:11px;color:var(--soft)}} .columns{{height:16px}}
.rows span{{position:absolute;right:0;transform:translateY(-50%)}}
.columns span{{position:absolute;transform:translateX(-50%)}}
.heat .unit{{text-align:center}}
.play{{display:flex;align-items:center;gap:12px;margin:8px 0 4px}} .play input{{flex:1;min-width:0}}
.play output{{min-width:92px;text-align:right;font-variant-numeric:tabular-nums}}
button{{font:inherit;min-width:68px;padding:3px 12px;border-radius:6px;border:1px solid var(--grid);
background:var(--page);color:var(--ink);cursor:pointer}}
.scroll{{overflow-x:auto;background:var(--card);border:1px solid var(--grid);border-radius:8px}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}}
th,td{{text-align:right;padding:6px 12px;border-bottom:1px solid var(--grid);white-space:nowrap}}
tr:last-child td{{border-bottom:0}} th{{color:var(--soft);font-weight:500;font-size:.82rem}}
details{{margin-top:24px}} summary{{cursor:pointer;color:var(--soft)}}
pre{{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px;
overflow-x:auto;font-size:.82rem}}
"""

SCRIPT = """
"use strict";
const tip = document.body.appendChild(Object.assign(document.createElement("div"),
  {className: "tip"}));
function showTip(event, text) {
  tip.textContent = text;
  tip.style.display = "block";
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  const above = event.clientY - tip.offsetHeight - 10;
  tip.style.left = Math.max(4, x) + "px";
  tip.style.top = (above > 0 ? above : event.clientY + 16) + "px";
}
function hideTip() { tip.style.display = "none"; }

// Values are read back from the coordinates that were drawn.
for (const svg of document.querySelectorAll("svg[data-scale]")) {
  const [x0, x1, y0, y1] = svg.dataset.scale.split(",").map(Number);
  const [left, right, top, bottom] = BOX;
  const lines = [...svg.querySelectorAll("polyline[data-name]")];
  const cursor = svg.appendChild(
    document.createElementNS("http://www.w3.org/2000/svg", "line"));
  cursor.setAttribute("class", "cursor");
  const toStep = x => x0 + (x - left) / (right - left) * (x1 - x0);
  const toValue = y => y0 + (bottom - y) / (bottom - top) * (y1 - y0);
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width;
    const rows = [];
    let nearest = null, below = 0;
    for (const line of lines) {
      let best = line.points[0];
      for (const point of line.points)
        if (Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
      const value = toValue(best.y);
      const shown = "stacked" in svg.dataset ? value - below : value;
      below = value;
      rows.push(line.dataset.name + "  " + Number(shown.toPrecision(3)));
      if (nearest === null || Math.abs(best.x - x) < Math.abs(nearest - x)) nearest = best.x;
    }
    for (const [key, value] of [["x1", nearest], ["x2", nearest], ["y1", top], ["y2", bottom]])
      cursor.setAttribute(key, value);
    if ("stacked" in svg.dataset) rows.reverse();
    showTip(event, ["step " + Math.round(toStep(nearest)), ...rows].join("\\n"));
  });
  svg.addEventListener("pointerleave", () => { hideTip(); cursor.removeAttribute("y2"); });
}

const heat = document.getElementById("heat");
if (heat) {
  const facts = JSON.parse(heat.querySelector("script").textContent);
  const cells = Uint8Array.from(atob(facts.cells), c => c.charCodeAt(0));
  const [canvas, slider, button, output] =
    ["canvas", "input", "button", "output"].map(name => heat.querySelector(name));
  const rows = facts.layers.length, columns = facts.experts;
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  function color(name) {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
  }
  function draw() {
    const [low, mid, high, idle] = ["--low", "--mid", "--high", "--idle"].map(color);
    const frame = Number(slider.value), image = context.createImageData(columns, rows);
    for (let cell = 0; cell < rows * columns; cell++) {
      const byte = cells[frame * rows * columns + cell];
      const share = (byte - 1) / 127 - 1, end = share < 0 ? low : high;
      for (let part = 0; part < 3; part++)
        image.data[4 * cell + part] = byte === 0 ? idle[part]
          : mid[part] + Math.abs(share) * (end[part] - mid[part]);
      image.data[4 * cell + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    output.textContent = "step " + facts.steps[frame].toLocaleString("en");
  }
  slider.addEventListener("input", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    const place = (at, start, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((at - start) / size * count)));
    const row = place(event.clientY, box.top, box.height, rows);
    const column = place(event.clientX, box.left, box.width, columns);
    const byte = cells[(Number(slider.value) * rows + row) * columns + column];
    const ratio = Math.pow(facts.cap, (byte - 1) / 127 - 1).toFixed(2);
    const end = byte === 1 ? " or less" : byte === 255 ? " or more" : "";
    showTip(event, `layer ${facts.layers[row]}, expert ${column}\\n` +
      (byte === 0 ? "idle" : `${ratio}x the mean${end}`));
  });
  canvas.addEventListener("pointerleave", hideTip);
  let timer = null;
  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(() => {
      if (slider.value === slider.max) return stop();
      slider.value = Number(slider.value) + 1;
      draw();
    }, 150);
  });
  draw();
}
"""
