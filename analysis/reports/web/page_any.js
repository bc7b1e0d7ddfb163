// One series of the reader's choice, drawn by the page itself: a run holds more than its figures can show.
function anySeries(charts, listen) {
  const all = [...series.values()].filter((one) => one.steps.length);
  if (all.length < 2) return;
  const section = document.createElement("section"), label = document.createElement("label"), choice = document.createElement("select");
  section.id = "any";
  section.append(Object.assign(document.createElement("h2"), { textContent: "Any series" }));
  label.textContent = "Series ";
  for (const one of all) choice.append(new Option(one.name, one.name));
  label.append(choice);
  const figure = document.createElement("figure"), told = document.createElement("figcaption");
  const svg = make(figure, "svg", { viewBox: "0 0 619 190", role: "img" });
  figure.append(told);
  section.append(label, figure);
  if (data.note) section.append(Object.assign(document.createElement("p"), { className: "note", textContent: data.note }));
  const before = document.getElementById("provenance"); // a comparison of runs has none
  if (before) before.before(section);
  else document.querySelector("main").append(section);
  const link = document.createElement("a");
  link.href = "#any";
  link.textContent = "Any series";
  const next = document.querySelector('nav a[href="#provenance"]');
  if (next) next.before(link, " ");
  else document.querySelector("nav").append(link);
  const box = [61, 12, 610, 150], clip = make(make(svg, "defs", {}), "clipPath", { id: "any-clip" });
  make(clip, "rect", { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] });
  const group = make(svg, "g", {}), cursor = make(svg, "line", { class: "cursor", y1: box[1], y2: box[3] });
  const panel = { box, group, cursor, lines: [], rows: [], values: [], own: [], measured: [], steps: [], threshold: 0, scale: "linear", limits: [0, 1] };

  function choose() {
    const one = series.get(choice.value), first = one.steps.find((step) => step > 0), last = one.steps[one.steps.length - 1];
    const zero = one.steps[0] === 0, logarithmic = first !== undefined && last / first >= 8;
    Object.assign(panel, { lines: [one.name], own: [one], measured: one.steps, threshold: logarithmic && zero ? first : 0 });
    panel.scale = !logarithmic ? "linear" : zero ? "symlog" : "log";
    const margin = 0.02 * (last - one.steps[0]) || 1;
    panel.limits = !logarithmic ? [one.steps[0] - margin, last + margin] : [zero ? -0.15 * first : first / 1.08, last * (last / first) ** 0.015];
    redraw(panel);
  }

  panel.draw = () => {
    const [one] = panel.own, bad = new Set(one.rejected), good = [...one.steps.keys()].filter((i) => one.values[i] !== null && !bad.has(i));
    const half = (i) => 1.645 * (one.se?.[i] ?? 0);
    let low = Infinity, high = -Infinity;
    for (const i of good) [low, high] = [Math.min(low, one.values[i] - half(i)), Math.max(high, one.values[i] + half(i))];
    if (low > high) [low, high] = [0, 1];
    const margin = 0.08 * (high - low) || 0.05 * Math.abs(high) || 1, [left, top, right, bottom] = box;
    [low, high] = [low - margin, high + margin];
    const x = (i) => place(panel, one.steps[i]).toFixed(2), y = (value) => (bottom - ((value - low) / (high - low)) * (bottom - top)).toFixed(2);
    group.replaceChildren();
    for (const value of round(low, high, 5)) {
      make(group, "line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) });
      make(group, "text", { x: left - 5, y: Number(y(value)) + 3, class: "label end" }, words(value));
    }
    drawTicks(panel, true);
    const inside = make(group, "g", { "clip-path": "url(#any-clip)" });
    for (const event of data.events.filter((found) => found.series === one.name)) {
      const [a, b, at] = [event.low, event.high, event.step].map((step) => place(panel, step));
      make(inside, "rect", { class: `event ${event.kind}`, x: a, width: Math.max(b - a, 0.5), y: top, height: bottom - top });
      make(inside, "line", { class: `event ${event.kind}`, x1: at, x2: at, y1: top, y2: bottom });
    }
    const upper = good.map((i) => `${x(i)} ${y(one.values[i] + half(i))}`), lower = good.map((i) => `${x(i)} ${y(one.values[i] - half(i))}`).reverse();
    if (one.se && good.length > 1) make(inside, "path", { class: "band", d: `M${[...upper, ...lower].join("L")}z` });
    make(inside, "path", { class: "line", d: good.length ? `M${good.map((i) => `${x(i)} ${y(one.values[i])}`).join("L")}` : "" });
    if (good.length <= 150) for (const i of good) make(inside, "circle", { class: "dot", cx: x(i), cy: y(one.values[i]), r: 1.6 });
    for (const i of bad) make(inside, "circle", { class: "bad", cx: x(i), cy: y(Math.min(Math.max(one.values[i] ?? low, low), high)), r: 3 });
    make(group, "path", { class: "tick", d: `M${left} ${top}V${bottom}H${right}`, fill: "none" });
    make(group, "text", { x: (left + right) / 2, y: 186, class: "label middle" }, `optimizer step (${panel.now.scale === "linear" ? "linear" : "log scale"})`);
    if (one.units) make(group, "text", { x: 12, y: (top + bottom) / 2, class: "label middle", transform: `rotate(-90 12 ${(top + bottom) / 2})` }, one.units);
    told.textContent = `${one.name}: ${one.steps.length} checkpoints${good.length ? "" : ", no accepted finite value"}.${one.se ? " Band: ±1.64 standard errors." : ""}${bad.size ? ` Hollow: ${bad.size} rejected.` : ""}`;
    svg.setAttribute("aria-label", told.textContent);
  };

  const chart = { svg, panels: [panel] };
  charts.push(chart);
  choice.addEventListener("change", choose);
  choose();
  listen(chart);
}
