// Hover values, one step cursor and one zoom through all panels, log or linear steps, switches, CSV. Loads nothing.
const data = JSON.parse(document.getElementById("numbers").textContent);
for (const one of data.series) one.steps = data.grids[one.steps];
const series = new Map(data.series.map((one) => [one.name, one]));
const tip = document.getElementById("tip"), said = document.getElementById("said"), tools = document.getElementById("tools");
const charts = [];
let current = null, dragged = null, linked = null; // `linked` is the step that the address names

const words = (value) => (value === null ? "–" : String(Number(value.toPrecision(4)))).replace("-", "−");

function button(parent, text, pressed, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.title = text;
  if (pressed) made.setAttribute("aria-pressed", "true");
  made.addEventListener("click", () => act(made));
  parent.append(made);
  return made;
}

// ---- panels ----

function panelOf(panel, svg) {
  const own = panel.lines.map((name) => series.get(name)).filter(Boolean);
  const measured = columns(panel) ? panel.steps : [...new Set(own.flatMap((one) => one.steps))].sort((a, b) => a - b);
  const group = document.getElementById(panel.group);
  const cursor = make(group ?? svg, "line", { class: "cursor", y1: panel.box[1], y2: panel.box[3] });
  const made = { ...panel, own, measured, cursor, group };
  look(made);
  made.drawn = made.now;
  return made;
}

const every = () => charts.flatMap(({ panels }) => panels);

function move(step) {
  current = step;
  for (const panel of every()) {
    const x = step === null ? NaN : place(panel, step), [left, , right] = panel.box;
    const ends = columns(panel) ? [panel.steps[0], panel.steps[panel.steps.length - 1]] : [-Infinity, Infinity];
    const seen = x >= left - 0.5 && x <= right + 0.5 && step >= ends[0] && step <= ends[1];
    panel.cursor.style.visibility = seen ? "visible" : "hidden";
    for (const key of seen ? ["x1", "x2"] : []) panel.cursor.setAttribute(key, x);
  }
}

// what lies at a step: the values of lines, one row of a heat map or of a list of events
function lines(panel, step, y) {
  if (panel.rows.length) {
    const height = (panel.box[3] - panel.box[1]) / panel.rows.length;
    const row = Math.min(Math.max(Math.floor((y - panel.box[1]) / height), 0), panel.rows.length - 1);
    if (!panel.values.length) return [panel.rows[row]];
    const value = panel.values[row][nearest(panel.steps, step)];
    return [`${panel.rows[row]}: ${words(value === null ? null : value * panel.unit)}`];
  }
  return panel.own.slice(0, 16).flatMap((one) => {
    const i = one.steps.indexOf(step);
    if (i < 0) return [`${one.name}: not measured`];
    const error = one.se && one.se[i] !== null ? ` ± ${words(1.645 * one.se[i])}` : "";
    const near = data.events.filter((event) => event.series === one.name && event.low <= step && step <= event.high);
    const told = near.map((event) => `  ${event.kind} at ${Math.round(event.step)} [${Math.round(event.low)}, ${Math.round(event.high)}], q ${event.q === null ? "–" : words(event.q)}`);
    return [`${one.name}: ${words(one.values[i])}${error} ${one.units}${one.rejected.includes(i) ? " (rejected)" : ""}`, ...told];
  });
}

// ---- zoom: one range of steps for all panels ----

function show(low, high) {
  const steps = every().flatMap(({ measured }) => (measured.length ? [measured[0], measured[measured.length - 1]] : []));
  const ends = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  if (low !== null) [low, high] = [Math.max(low, ends[0]), Math.min(high, ends[1])];
  if (low !== null && !(high - low > 1e-3 * Math.max(1, 0.001 * high))) return;
  if (low !== null && low <= ends[0] && high >= ends[1]) low = high = null;
  Object.assign(view, { low, high });
  every().forEach(redraw);
  move(current);
  whole.disabled = low === null;
  turned.textContent = view.linear ? "Steps: linear" : "Steps: log";
  said.textContent = low === null ? "all steps shown" : `steps ${Math.round(low)} to ${Math.round(high)} shown`;
  remember();
}

// a range as wide as now times `factor` around the cursor, or moved by `shift` of its width
function widen(panel, factor, shift) {
  const { scale, from, to } = panel.now, middle = current === null ? (from + to) / 2 : along(panel, scale, current);
  const width = to - from, keep = Math.min(Math.max((middle - from) / width, 0), 1);
  const a = shift ? from + shift * width : middle - keep * width * factor, b = shift ? to + shift * width : a + width * factor;
  show(Math.max(back(panel, scale, a), 0), back(panel, scale, b));
}

// ---- hover, drag and keys ----

function tell(panel, step, y, left, top) {
  move(step);
  tip.textContent = [`step ${Math.round(step)}`, ...lines(panel, step, y)].join("\n");
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(left + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(top + 14, innerHeight - tip.offsetHeight - 8))}px`;
}

function hide() {
  move(linked);
  tip.hidden = true;
}

function listen(chart) {
  const { svg, panels } = chart;
  const at = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const under = ({ x, y }) => panels.find(({ box }) => x >= box[0] - 3 && x <= box[2] + 3 && y >= box[1] && y <= box[3]);
  svg.addEventListener("pointerdown", (event) => {
    const point = at(event), panel = under(point);
    if (!panel || event.button !== 0 || panel.scale === "square") return;
    const step = current;
    dragged = { panel, from: point.x, mark: make(panel.group, "rect", { class: "chosen", y: panel.box[1], height: panel.box[3] - panel.box[1], width: 0 }) };
    svg.setPointerCapture(event.pointerId);
    hide();
    move(step); // a click without a drag links to it
  });
  svg.addEventListener("pointermove", (event) => {
    const point = at(event);
    if (dragged) {
      const [left, , right] = dragged.panel.box, x = Math.min(Math.max(point.x, left), right);
      dragged.to = x;
      dragged.mark.setAttribute("x", Math.min(x, dragged.from));
      dragged.mark.setAttribute("width", Math.abs(x - dragged.from));
      return;
    }
    const panel = under(point);
    if (!panel || !(panel.measured.length || panel.rows.length)) return hide();
    panel.spots ??= panel.measured.map((step) => place(panel, step));
    const step = panel.measured.length ? panel.measured[nearest(panel.spots, point.x)] : stepAt(panel, point.x);
    tell(panel, step, point.y, event.clientX, event.clientY);
  });
  const drop = (zoom) => {
    if (!dragged) return;
    const { panel, from, to, mark } = dragged;
    mark.remove();
    dragged = null;
    if (zoom && to !== undefined && Math.abs(to - from) > 5) show(stepAt(panel, Math.min(from, to)), stepAt(panel, Math.max(from, to)));
    else if (zoom && current !== null) link(current);
  };
  svg.addEventListener("pointerup", () => drop(true));
  svg.addEventListener("pointercancel", () => drop(false));
  svg.addEventListener("dblclick", () => show(null, null));
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.tabIndex = 0;
  svg.setAttribute("aria-describedby", "keys");
  const all = [...new Set(panels.flatMap(({ measured }) => measured))].sort((a, b) => a - b);
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = panels.length === 1 ? panels[0].measured : all, panel = panels.find(({ measured }) => measured.length) ?? panels[0];
    const zooms = { "+": () => widen(panel, 0.5), "=": () => widen(panel, 0.5), "-": () => widen(panel, 2), 0: () => show(null, null) };
    if (event.key === "Escape") {
      drop(false);
      hide();
    } else if (panel && zooms[event.key]) zooms[event.key]();
    else if (panel && event.shiftKey && event.key.startsWith("Arrow") && view.low !== null) widen(panel, 1, event.key === "ArrowLeft" ? -0.25 : 0.25);
    if (!steps.length || event.shiftKey || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const last = steps.length - 1;
    let i = current === null ? 0 : nearest(steps, current);
    if (current !== null) i += { ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0;
    i = event.key === "Home" ? 0 : event.key === "End" ? last : Math.min(Math.max(i, 0), last);
    const step = steps[i], width = view.high - view.low;
    if (view.low !== null && (step < view.low || step > view.high)) show(...(step < view.low ? [step, step + width] : [step - width, step]));
    const frame = svg.getBoundingClientRect();
    tell(panel, step, panel.box[1], frame.left + frame.width / 2, Math.max(frame.top, 0) + 30);
    const rest = panels.filter((one) => one !== panel && one.measured.length).flatMap((one) => lines(one, step, one.box[1]));
    tip.textContent += rest.length ? `\n${rest.join("\n")}` : "";
    said.textContent = tip.textContent;
  });
}

// ---- tools ----

const plain = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text); // no spreadsheet runs it
const cell = (text) => (/[",\r\n]/.test(text) ? `"${plain(text).replaceAll('"', '""')}"` : plain(text));
const csv = () => ["series,units,step,value,se,rejected", ...data.series.flatMap((one) => one.steps.map((step, i) =>
  [cell(one.name), cell(one.units), step, one.values[i] ?? "", one.se?.[i] ?? "", Number(one.rejected.includes(i))].join(",")))].join("\n");

function save(name, text, kind) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
}

function turn() {
  view.linear = !view.linear;
  show(view.low, view.high);
}

// a page that loads itself again keeps what its reader chose
const live = document.querySelector('meta[http-equiv="refresh"]') !== null;
function remember() {
  try {
    if (live) sessionStorage.setItem("devmon", JSON.stringify({ ...view, open: [...document.querySelectorAll("details.part[open]")].map((part) => part.parentElement.id) }));
  } catch { /* a browser that keeps nothing */ }
}
function recall() {
  try {
    return live && JSON.parse(sessionStorage.getItem("devmon"));
  } catch {
    return null;
  }
}

for (const figure of document.querySelectorAll("figure[data-name]")) {
  const { panels, parts } = data.figures[figure.dataset.name], svg = figure.querySelector("svg");
  const chart = { svg, panels: panels.map((panel) => panelOf(panel, svg)) };
  charts.push(chart);
  listen(chart);
  arrange(figure);
  if (!parts.length) continue;
  const bar = document.createElement("div");
  bar.className = "tools";
  svg.before(bar);
  for (const [label, ids] of parts) {
    button(bar, label, true, (self) => {
      const shown = self.getAttribute("aria-pressed") !== "true";
      self.setAttribute("aria-pressed", shown);
      for (const id of ids) document.getElementById(id)?.style.setProperty("display", shown ? "" : "none");
    });
  }
}
const turned = button(tools, "Steps: log", null, turn);
const whole = button(tools, "Show all steps", null, () => show(null, null));
whole.disabled = true;
button(tools, "Save the numbers (CSV)", null, () => save("series.csv", csv(), "text/csv"));
for (const code of document.querySelectorAll("pre[data-file]"))
  button(tools, `Save ${code.dataset.file}`, null, () => save(code.dataset.file, code.textContent, "text/plain"));
const help = document.createElement("p");
help.id = "keys";
help.className = "soft help";
help.textContent = "In a figure: drag to zoom all of them, double-click to show all, click to mark a step in the address; arrow keys read values, + and − zoom, 0 shows all, l is log or linear.";
tools.after(help);
document.addEventListener("keydown", (event) => {
  if (event.key === "l" && !event.ctrlKey && !event.metaKey && !event.altKey && !event.target.closest?.("select, input")) turn();
});
anySeries(charts, listen);
const kept = recall();
for (const id of kept?.open ?? []) document.querySelector(`#${CSS.escape(id)} > details.part`)?.setAttribute("open", "");
for (const part of document.querySelectorAll("details.part")) part.addEventListener("toggle", remember);
if (kept && (kept.linear || kept.low !== null)) {
  view.linear = kept.linear;
  show(kept.low, kept.high);
}

// ---- the address: #step=758 marks a step in every figure, another part is opened where it leads; print opens all ----

function link(step) {
  linked = step === linked ? null : step;
  history.replaceState(null, "", linked === null ? location.pathname + location.search : `#step=${Math.round(linked)}`);
  said.textContent = linked === null ? "no step marked" : `step ${Math.round(linked)} marked: the address links to it`;
  move(linked);
}

function follow() {
  const named = /^#step=(\d+(?:\.\d+)?)$/.exec(location.hash);
  linked = named ? Number(named[1]) : null;
  move(linked);
  const target = named || location.hash.length < 2 ? null : document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target && (target.querySelector(":scope > details.part") ?? target); at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", follow);
addEventListener("beforeprint", () => document.querySelectorAll("details.part").forEach((part) => { part.open = true; }));
follow();
