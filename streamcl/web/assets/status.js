// Asks /v1/status for what is new and lets uPlot draw it. Numbers in words come from there, as texts.
"use strict";

const number = (value) => value == null ? "–" : Number(value.toPrecision(4)).toLocaleString("en");
const share = (value) => value == null ? "–" : `${(100 * value).toFixed(1)} %`;
const whole = (value) => value == null ? "–" : Math.round(value).toLocaleString("en");
const seconds = (value) => value == null ? "–" : `${number(value)} s`;
const compact = new Intl.NumberFormat("en", { notation: "compact" });
const padded = (u, low, high) => {
  const room = Math.max((high - low) * 0.1, Math.abs(high) * 0.005, 1e-6);
  return low == null ? [0, 1] : [low - room, high + room];
};
const fromZero = (u, low, high) => [0, high ? high * 1.1 : 1];

// A line: name in `series`, what people read, colour, dashes, scale.
const CHARTS = [
  { id: "loss", title: "Loss", note: "recent window, the lower the better; ▼\u00a0drift\u00a0alarm", wide: true, say: number, range: padded, marks: true,
    none: "No label has been learned from yet.", lines: [
      ["loss_constant", "a constant", "constant", [2, 4]], ["loss_frozen", "frozen weights, sampled", "frozen", [8, 4]],
      ["loss_sampled", "this model, sampled", "model", [2, 2]],
      ["loss_without_memory", "without error memory", "other", [8, 3, 2, 3]], ["loss_live", "live model", "live", [8, 4]],
      ["loss", "this model", "model"]] },
  { id: "lag", title: "Lag", note: "what waits in the inputs", say: whole, range: fromZero, none: "Nothing has been read yet.",
    lines: [["lag_records", "records", "model"], ["lag_s", "behind", "frozen", [8, 4], "s"]] },
  { id: "rate", title: "Records per second", note: "of all inputs", say: whole, range: fromZero, none: "Nothing has been read yet.",
    lines: [["events_per_s", "records/s", "model"]] },
  { id: "ne", title: "Normalised entropy", note: "below 1 beats a constant", say: number, range: padded,
    none: "Not for this task, or no label yet.", lines: [["ne", "NE", "model"]] },
  { id: "auc", title: "AUC", note: "the higher the better", say: number, range: padded,
    none: "Not for this task, or not yet labels of both classes.", lines: [["auc", "AUC", "model"]] },
  { id: "dormant", title: "Dormant units", note: "the layer with the most", say: share, range: fromZero,
    none: "The window of [diagnostics] is not full yet, or there is no hidden layer.", lines: [["dormant", "dormant", "model"]] },
  { id: "joined", title: "Events that got a label", note: "of ended windows, since the first", say: share, range: fromZero,
    none: "Labels come with the events, or no window has ended yet.", lines: [["joined", "joined", "model"]] },
];

const page = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const clock = (at, fine) => new Date(1000 * at).toLocaleTimeString("en", {
  hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(fine ? { second: "2-digit" } : {}) });

let told = null; // the last answer
let held = { time: [] }; // series by name, what the answers came to
let plots = {}; // by chart: the uPlot, and which lines it has
let shard = page("shard").value;
let asked = 0; // answers to questions before this one are of another shard

function take(answer) {
  if (told && told.began !== answer.began) held = { time: [] }; // another process
  for (const [name, values] of Object.entries(answer.series)) held[name] = (held[name] ?? []).concat(values);
  const old = held.time.findIndex((at) => at >= answer.time - answer.history_s);
  if (old > 0) for (const name of Object.keys(held)) held[name] = held[name].slice(old);
  told = answer;
}

function write() {
  const { live, ready } = told;
  health(...(!live.ok ? ["dead", `Stalled: ${live.reason}`] : !ready.ok ? ["unready", `Not ready: ${ready.reason}`] : ["ok", "Live and ready"]));
  for (const { name, text } of told.figures) {
    for (const place of document.querySelectorAll(`[data-figure="${name}"]`)) place.textContent = text;
  }
  const names = told.figures.map((each) => each.name).join();
  if (page("rows").dataset.names !== names) {
    page("rows").dataset.names = names;
    page("rows").replaceChildren(...told.figures.map(({ name, title, text }) => {
      const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
      head.scope = "row";
      head.textContent = title;
      cell.dataset.figure = name;
      cell.textContent = text;
      row.append(head, cell);
      return row;
    }));
  }
  const indices = ["", ...told.shards.map(String)];
  if (indices.join() !== [...page("shard").options].map((each) => each.value).join()) {
    page("shard").replaceChildren(...indices.map((each) => new Option(each || "all", each, false, each === shard)));
  }
}

function health(kind, words) {
  const place = page("health");
  place.className = kind;
  if (place.textContent !== words) place.textContent = words; // said aloud only when it changes
}

// charts

const span = () => Number(document.querySelector("[name=span]:checked").value);
const shown = () => [Math.min(Math.max(held.time[0], told.time - span()), told.time - 60), told.time];
const width = (place) => Math.max(place.clientWidth, 200);

function frame({ id, title, note, wide }) {
  const made = document.createElement("figure"), caption = document.createElement("figcaption");
  const head = document.createElement("h3"), words = document.createElement("span"), plot = document.createElement("div");
  made.id = `chart-${id}`;
  made.className = wide ? "wide" : "";
  head.textContent = title;
  words.className = "soft";
  words.textContent = note;
  caption.append(head, words);
  plot.className = "plot";
  made.append(caption, plot);
  page("charts").append(made);
  return plot;
}

function axis(scale, say, extra = {}) {
  const grid = { stroke: colour("line"), width: 1 };
  return { scale, stroke: colour("soft"), font: "12px system-ui, sans-serif", grid, ticks: { ...grid, size: 4 }, values: (u, splits) => splits.map(say), ...extra };
}

function lines(chart, place) {
  const there = chart.lines.filter(([name]) => (held[name] ?? []).some((value) => value != null));
  const key = there.map(([name]) => name).join();
  let plot = plots[chart.id];
  if (!plot || plot.key !== key) {
    plot?.made?.destroy();
    place.replaceChildren();
    plot = plots[chart.id] = { key, made: key ? draw(chart, there, place) : nothing(chart.none, place) };
  }
  if (!plot.made) return;
  plot.made.setData([held.time, ...there.map(([name]) => held[name])]);
  latest(plot.made);
  const now = there.map(([name, words,,, scale]) => `${words} ${(scale === "s" ? seconds : chart.say)(held[name].at(-1))}`);
  const drifts = chart.marks ? `; drift alarms since the start: ${told.drift_alarms}` : "";
  place.ariaLabel = `${chart.title}, a chart of the last ${Math.round((shown()[1] - shown()[0]) / 60)} minutes. Now: ${now.join(", ")}${drifts}. Arrow keys read it.`;
}

function nothing(words, place) {
  const made = document.createElement("p");
  made.className = "none";
  made.textContent = words;
  place.append(made);
  for (const name of ["tabindex", "role", "aria-label"]) place.removeAttribute(name);
}

function draw(chart, there, place) {
  const right = there.some((line) => line[4]);
  const fine = (u, splits) => splits.map((at) => clock(at, splits.length > 1 && splits[1] - splits[0] < 60));
  const made = new uPlot({
    width: width(place), height: chart.wide ? 250 : 180,
    scales: { x: { range: shown }, y: { range: chart.range }, s: { range: fromZero } },
    axes: [
      axis("x", null, { values: fine, space: 70, size: 28 }),
      axis("y", (at) => chart.say === share ? `${Number((100 * at).toFixed(1))} %` : at >= 1e4 ? compact.format(at) : Number(at.toPrecision(6)), { size: 56 }),
      ...(right ? [axis("s", (at) => `${number(at)} s`, { side: 1, size: 56, grid: { show: false } })] : []),
    ],
    series: [
      { label: "time", value: (u, at) => at == null ? "–" : clock(at, true) },
      ...there.map(([, label, name, dash, scale]) => ({
        label, dash, scale: scale ?? "y", stroke: colour(name), width: 2, points: { show: false },
        value: (u, value) => (scale ? seconds : chart.say)(value) })),
    ],
    legend: { markers: { dash: (u, at) => u.series[at].dash ? "dashed" : "solid" } },
    cursor: { sync: { key: "time" }, y: false, drag: { x: false, y: false }, points: { size: 7 } },
    hooks: {
      draw: chart.marks ? [marks] : [],
      setCursor: [(u) => u.cursor.idx == null && latest(u)],
    },
  }, null, place);
  place.tabIndex = 0;
  place.role = "img";
  place.onkeydown = (event) => move(event, made, chart, there);
  place.onblur = () => made.setCursor({ left: -10, top: -10 });
  return made;
}

function latest(u) {
  if (u.cursor.left < 0 && u.data[0].length) u.setLegend({ idx: u.data[0].length - 1 }, false);
}

function marks(u) {
  const { ctx, bbox } = u;
  const size = 5 * devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("drift");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
  for (const at of told.drift_times) {
    const x = u.valToPos(at, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x - size, bbox.top - size);
    ctx.lineTo(x + size, bbox.top - size);
    ctx.lineTo(x, bbox.top + size);
    ctx.fill();
  }
  ctx.restore();
}

function move(event, u, chart, there) {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30, Home: -Infinity, End: Infinity }[event.key];
  if (!step) return;
  event.preventDefault();
  const first = held.time.findIndex((at) => at >= shown()[0]), last = held.time.length - 1;
  const from = u.cursor.left < 0 ? last + 1 : u.cursor.idx;
  const idx = Math.max(first, Math.min(last, from + step));
  u.setCursor({ left: u.valToPos(held.time[idx], "x"), top: u.over.clientHeight / 2 });
  const values = there.map(([name, words,,, scale]) => `${words} ${(scale ? seconds : chart.say)(held[name][idx])}`);
  page("spoken").textContent = `${clock(held.time[idx], true)}: ${values.join(", ")}`;
}

function letters(place) {
  const counts = Object.entries(told.dead_letters).slice(0, 6);
  const key = JSON.stringify(counts);
  let plot = plots.letters;
  if (plot?.key === key) return;
  plot?.made?.destroy();
  place.replaceChildren();
  plots.letters = { key, made: counts.length ? bars(counts, place) : nothing("None: every record could be used.", place) };
}

function bars(counts, place) {
  const words = counts.map(([reason]) => reason.replaceAll("_", " "));
  const most = Math.max(...counts.map(([, count]) => count));
  place.tabIndex = 0;
  place.role = "img";
  place.ariaLabel = `Dead letters by reason, a bar chart: ${counts.map(([, count], at) => `${words[at]} ${count}`).join(", ")}.`;
  place.onkeydown = place.onblur = null;
  return new uPlot({
    width: width(place), height: 34 * counts.length + 30, legend: { show: false }, cursor: { show: false },
    padding: [0, 50, 0, 0],
    scales: { x: { time: false, ori: 1, dir: -1, range: [-0.5, counts.length - 0.5] }, y: { ori: 0, dir: 1, range: [0, most] } },
    axes: [
      axis("x", (at) => words[at], { side: 3, size: 130, grid: { show: false }, ticks: { show: false }, splits: () => counts.map((_, at) => at) }),
      axis("y", (at) => Number.isInteger(at) ? compact.format(at) : "", { side: 2, space: 60, size: 28 }),
    ],
    series: [{}, { fill: colour("model"), width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.6, 26] }) }],
    hooks: { draw: [(u) => {
      u.ctx.save();
      u.ctx.fillStyle = colour("ink");
      u.ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
      u.ctx.textAlign = "left";
      u.ctx.textBaseline = "middle";
      counts.forEach(([, count], at) => u.ctx.fillText(whole(count), u.valToPos(count, "y", true) + 6 * devicePixelRatio, u.valToPos(at, "x", true)));
      u.ctx.restore();
    }] },
  }, [counts.map((_, at) => at), counts.map(([, count]) => count)], place);
}

function drawAll() {
  if (!told || typeof uPlot === "undefined") return;
  for (const [chart, place] of frames) lines(chart, place);
  letters(lettersPlace);
}

function redraw() {
  for (const plot of Object.values(plots)) plot.made?.destroy();
  plots = {};
  drawAll();
}

// asking

let paused = false, timer = 0;

async function ask() {
  clearTimeout(timer);
  const mine = ++asked;
  const since = held.time.at(-1) ?? 0;
  try {
    const response = await fetch(`v1/status?${new URLSearchParams({ shard, since })}`, { signal: AbortSignal.timeout(10_000) });
    if (!response.ok) throw new Error(response.statusText);
    const answer = await response.json();
    if (mine !== asked) return;
    take(answer);
    write();
    drawAll();
  } catch (error) {
    if (mine !== asked) return;
    if (!(error instanceof TypeError || error instanceof DOMException)) console.error(error); // neither away nor late
    health("dead", `No answer from the worker since ${told ? clock(told.time, true) : "this page was loaded"}`);
  }
  if (!paused && !document.hidden) timer = setTimeout(ask, 1000 * (told?.interval_s ?? 2));
}

page("shard").onchange = () => {
  shard = page("shard").value;
  const place = new URL(location);
  shard ? place.searchParams.set("shard", shard) : place.searchParams.delete("shard");
  history.replaceState(null, "", place);
  held = { time: [] };
  ask();
};
page("controls").onsubmit = (event) => event.preventDefault();
for (const each of document.querySelectorAll("[name=span]")) each.onchange = drawAll;
page("pause").onclick = () => {
  paused = !paused;
  page("pause").ariaPressed = String(paused);
  page("pause").textContent = paused ? "Paused" : "Pause";
  paused ? clearTimeout(timer) : ask();
};
document.onvisibilitychange = () => document.hidden || paused || ask();

const frames = [], lettersChart = { id: "letters", title: "Dead letters", note: "since the start, by reason", wide: true };
let lettersPlace = null;
if (typeof uPlot !== "undefined") {
  page("drawn").hidden = false;
  for (const chart of CHARTS) frames.push([chart, frame(chart)]);
  lettersPlace = frame(lettersChart);
  matchMedia("(prefers-color-scheme: dark)").onchange = redraw;
  new ResizeObserver(() => {
    for (const [id, { made }] of Object.entries(plots)) {
      const place = page(`chart-${id}`).querySelector(".plot");
      if (made && made.width !== width(place)) made.setSize({ width: width(place), height: made.height });
    }
  }).observe(page("charts"));
}
ask();
