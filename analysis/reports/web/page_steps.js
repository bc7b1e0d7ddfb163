// The axes of steps: where a step is drawn, and how a drawing follows when the axis is zoomed or made linear.
const view = { linear: false, low: null, high: null }; // of all panels; null: from the first step, to the last
const NS = "http://www.w3.org/2000/svg";
const BELOW = 0.35 / 0.9; // decades that the part of a "symlog" axis up to its threshold takes

function make(parent, name, attributes, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// index of the value of a sorted list that is nearest
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle;
  }
  return Math.abs(sorted[high] - value) < Math.abs(value - sorted[low]) ? high : low;
}

const columns = (panel) => panel.scale === "columns" || panel.scale === "square";
const scaleNow = (panel) => (view.linear && panel.scale.endsWith("log") ? "linear" : panel.scale);

// a step on a scale of the panel, and back; columns are counted
function along(panel, scale, step) {
  if (columns(panel)) return nearest(panel.steps, step);
  if (scale === "symlog") return step <= panel.threshold ? (BELOW * step) / panel.threshold : BELOW + Math.log10(step / panel.threshold);
  return scale === "log" ? Math.log10(Math.max(step, 1e-9)) : step;
}
function back(panel, scale, at) {
  if (columns(panel)) return panel.steps[Math.min(Math.max(Math.round(at), 0), panel.steps.length - 1)];
  if (scale === "symlog") return at <= BELOW ? (at * panel.threshold) / BELOW : panel.threshold * 10 ** (at - BELOW);
  return scale === "log" ? 10 ** at : at;
}

// what the panel shows from left to right, on its scale: as it was drawn, and now
function range(panel, scale, low, high) {
  if (columns(panel)) {
    const last = panel.steps.length - 1;
    if (low === null || panel.scale === "square") return [-0.5, last + 0.5];
    let a = panel.steps.findIndex((step) => step >= low), b = panel.steps.findLastIndex((step) => step <= high);
    if (a < 0 || b < a) a = b = nearest(panel.steps, (low + high) / 2);
    return [a - 0.5, b + 0.5];
  }
  const [first, last] = panel.limits;
  if (low !== null) return [along(panel, scale, low), along(panel, scale, high)];
  if (scale === panel.scale) return [along(panel, scale, first), along(panel, scale, last)];
  const from = Math.max(first, 0), margin = 0.012 * (last - from);
  return [from - margin, last + margin];
}

function place(panel, step) {
  const [left, , right] = panel.box, { scale, from, to } = panel.now;
  return left + ((along(panel, scale, step) - from) / (to - from)) * (right - left);
}
function stepAt(panel, x) {
  const [left, , right] = panel.box, { scale, from, to } = panel.now;
  return Math.max(back(panel, scale, from + ((x - left) / (right - left)) * (to - from)), 0);
}

function look(panel) {
  const scale = scaleNow(panel), [from, to] = range(panel, scale, view.low, view.high);
  panel.now = { scale, from, to };
  panel.spots = null;
}

// ---- drawings of matplotlib: every drawn x between the panel's sides moves ----

function nodesOf(panel) {
  const found = [];
  for (const node of panel.group.querySelectorAll("use, path, text, image")) {
    if (node.closest(".xtick") || (node.tagName === "text" && !node.closest('[id*="at-step-"]'))) continue;
    const defs = node.closest("defs");
    // of a band the path moves and not its use, of a mark the use and not its shape
    if (defs ? !defs.parentNode.querySelector('use[x="0"]') : node.getAttribute("x") === "0") continue;
    const key = node.tagName === "path" ? "d" : node.hasAttribute("x") ? "x" : "transform";
    if (node.getAttribute(key) === null) continue;
    const loose = node.tagName !== "path" && node.tagName !== "image" && !node.closest("[clip-path]") && key === "x";
    found.push({ node, key, loose, drawn: node.getAttribute(key), width: Number(node.getAttribute("width")) });
  }
  return found;
}

function redraw(panel) {
  look(panel);
  if (panel.draw) return panel.draw();
  if (!panel.group || panel.scale === "square") return undefined;
  const [left, , right] = panel.box, { now, drawn } = panel, wide = right - left;
  const to = (x) => {
    if (x < left + 0.02 || x > right - 0.02) return x; // spines and grid lines: paths are cut off to hundredths
    const at = drawn.from + ((x - left) / wide) * (drawn.to - drawn.from);
    const there = now.scale === drawn.scale ? at : along(panel, now.scale, back(panel, drawn.scale, at));
    return Math.round((left + ((there - now.from) / (now.to - now.from)) * wide) * 100) / 100;
  };
  panel.nodes ??= nodesOf(panel);
  const asDrawn = !view.linear && view.low === null;
  for (const one of panel.nodes) {
    if (asDrawn) {
      one.node.setAttribute(one.key, one.drawn);
      if (one.width) one.node.setAttribute("width", one.width);
      one.node.style.visibility = "";
    } else if (one.width && one.node.tagName === "image") {
      const x = Number(one.drawn), scale = (drawn.to - drawn.from) / (now.to - now.from);
      one.node.setAttribute("preserveAspectRatio", "none");
      one.node.setAttribute("x", left + ((drawn.from - now.from) / (now.to - now.from)) * wide + (x - left) * scale);
      one.node.setAttribute("width", one.width * scale);
    } else if (one.key === "x") {
      const x = Number(one.drawn), moved = to(x);
      one.node.setAttribute("x", moved);
      if (one.loose) one.node.style.visibility = moved < left - 0.5 || (moved > right + 0.5 && x < right) ? "hidden" : "";
    } else {
      one.node.setAttribute(one.key, one.drawn.replace(/([ML]|translate\(|rotate\([-\d.]+ )(-?[\d.]+)/g, (_, word, x) => word + to(Number(x))));
    }
  }
  const own = [...panel.group.querySelectorAll(".xtick")];
  for (const tick of own) tick.style.display = asDrawn ? "" : "none";
  panel.ticks?.remove();
  const words = own.map((tick) => tick.querySelector("text")).find(Boolean);
  if (!asDrawn) panel.ticks = drawTicks(panel, words);
  const name = [...panel.group.querySelectorAll("text")].find((text) => /^optimizer step/.test(text.textContent));
  if (name && panel.scale !== "linear") name.textContent = now.scale === "linear" ? "optimizer step (linear)" : "optimizer step (log scale)";
  return undefined;
}

const stepWords = (value) => {
  const [size, sign] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([one]) => Math.abs(value) >= one) ?? [1, ""];
  return `${Number((value / size).toPrecision(5))}${sign}`;
};

function round(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((digit) => digit * power).find((one) => one >= rough);
  const found = [];
  for (let i = Math.ceil(low / gap - 1e-9); i * gap <= high + 1e-9 * gap; i += 1) found.push(Number((i * gap).toPrecision(12)));
  return found;
}

// steps to name on the axis
function tickSteps(panel) {
  const { scale, from, to } = panel.now;
  if (columns(panel)) {
    const a = Math.ceil(from), b = Math.floor(to), gap = Math.max(1, Math.ceil((b - a + 1) / 9));
    return panel.steps.slice(a, b + 1).filter((_, i) => i % gap === 0);
  }
  const low = Math.max(back(panel, scale, from), 0), high = back(panel, scale, to), least = Math.max(low, panel.threshold || 1e-9);
  if (scale === "linear" || high / least < 8) return round(low, high, 7);
  const digits = Math.log10(high / least) > 2.6 ? [1] : [1, 2, 5], found = low <= 0 ? [0] : [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.log10(high); power += 1)
    for (const digit of digits) if (digit * 10 ** power >= least * 0.999 && digit * 10 ** power <= high) found.push(Number((digit * 10 ** power).toPrecision(3)));
  return found;
}

function drawTicks(panel, like) {
  const group = make(panel.group, "g", { class: "ticks" }), [, top, , bottom] = panel.box;
  for (const step of tickSteps(panel)) {
    const x = place(panel, step).toFixed(2);
    if (!columns(panel)) make(group, "line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom });
    make(group, "line", { class: "tick", x1: x, x2: x, y1: bottom, y2: bottom + 3.5 });
    if (like) make(group, "text", { x, y: bottom + 14.5, style: "font: 9.5px sans-serif; text-anchor: middle" }, stepWords(step));
  }
  panel.group.insertBefore(group, panel.group.children[1] ?? null);
  return group;
}
