// Where a run's time goes: the parts of its steps stacked, and a metric of every rank as a heat map; each with a table.
//
// The numbers are those of cluster/dashboard/performance.py, which says what each part is.

import { writer } from "./charts.js";
import { bytes, el, get, number, percent, styled, svg } from "./common.js";

const WIDTH = 1000;
const HEIGHT = 240;
const COLOURS = ["--curve-1", "--curve-2", "--curve-3", "--curve-4", "--curve-5", "--curve-6", "--curve-7", "--superseded"];
const MOST_ROWS_PX = 480;

/** Draw all of it into an element, for the run of this name, between two steps (null: from or to its end). */
export async function drawPerformance(element, name, start = null, stop = null) {
  const run = `/api/runs/${encodeURIComponent(name)}`;
  const split = await get(`${run}/performance`, { start, stop });
  const memory = await get(`${run}/memory`);
  element.replaceChildren(splitOf(split), await ranksOf(run, start, stop), memoryOf(memory));
}

function table(head, rows) {
  return el(
    "div",
    { class: "table" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => (cell instanceof Node ? el("td", {}, cell) : el("td", { text: cell })))))),
    ),
  );
}

function section(title, ...children) {
  return el("section", { class: "panel", "aria-label": title }, el("h2", { text: title }), ...children);
}

// --- over steps

function splitOf(found) {
  if (!found.x.length) return section("Time of a step", el("p", { text: "No step has been recorded yet." }));
  const write = writer("step_s");
  const heights = found.x.map((_, i) => found.order.reduce((sum, part) => sum + found.parts[part][i], 0));
  const all = found.order.reduce((sum, part) => sum + found.totals[part], 0) || 1;
  const rows = found.order.map((part, i) => {
    const mark = svg("svg", { width: 10, height: 10, "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, fill: `var(${COLOURS[i]})` }));
    return [el("span", {}, mark, ` ${part}`), write(found.totals[part]), percent(found.totals[part] / all)];
  });
  return section(
    "Time of a step",
    stack(found, Math.max(...heights)),
    el("p", { text: `Steps ${number(found.x[0] - found.steps[0] + 1)} to ${number(found.x.at(-1))}; the top of the drawing is ${write(Math.max(...heights))} a step.` }),
    table(["part", "time", "share"], rows),
  );
}

/** A bar a bucket, as wide as the steps in it: no line is drawn between what was not measured. */
function stack(found, top) {
  const first = found.x[0] - found.steps[0];
  const scale = WIDTH / (found.x.at(-1) - first);
  const bottoms = found.x.map(() => 0);
  const areas = found.order.map((part, place) => {
    const bars = found.x.map((x, i) => {
      const value = found.parts[part][i];
      const left = scale * (x - found.steps[i] - first);
      const right = scale * (x - first);
      const low = HEIGHT * (1 - bottoms[i] / top);
      bottoms[i] += value;
      return `M${left} ${low}H${right}V${HEIGHT * (1 - bottoms[i] / top)}H${left}Z`;
    });
    return svg("path", { d: bars.join(""), fill: `var(${COLOURS[place]})` }, svg("title", { text: part }));
  });
  const label = "Parts of the time of a step, stacked, over the run's steps; the table below has their sums";
  return svg("svg", { class: "performance-stack", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: "100%", height: HEIGHT, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...areas);
}

// --- over ranks

async function ranksOf(run, start, stop) {
  const body = el("div", {});
  const choice = el("select", { "aria-label": "Metric of the ranks" });
  const show = async () => {
    const found = await get(`${run}/ranks`, { metric: choice.value || "own_s", start, stop });
    if (!choice.options.length) choice.append(...found.metrics.map((metric) => el("option", { value: metric, text: metric, selected: metric === found.metric })));
    body.replaceChildren(...(found.ranks.length ? drawn(found) : [el("p", { text: "No rank has recorded it." })]));
  };
  choice.addEventListener("change", show);
  await show();
  return section("Ranks", choice, body);
}

function drawn(found) {
  const write = writer(found.metric);
  const values = found.mean.flat().filter((value) => value !== null);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const told = el("p", { role: "status", text: `From ${write(low)} (pale) to ${write(high)} (dark), means of ${found.x.length} stretches of steps.` });
  const seconds = writer("own_s");
  const slowest = found.slowest.map((each) => [number(each.rank), each.node ?? "", seconds(each.own_s), `${each.factor.toFixed(2)} ×`]);
  return [
    heatMap(found, low, high, write, told),
    told,
    table(["rank", "node", "own time a step", "of the median rank's"], slowest),
  ];
}

/** A row of the canvas is a rank, or several of which the largest is shown where there are more than fit. */
function heatMap(found, low, high, write, told) {
  const rows = Math.min(found.ranks.length, MOST_ROWS_PX);
  const cell = Math.max(1, Math.min(24, Math.floor(MOST_ROWS_PX / rows)));
  const label = `Heat map of ${found.metric}: ${found.ranks.length} ranks from top to bottom, steps from left to right`;
  const canvas = el("canvas", { width: WIDTH, height: rows * cell, role: "img", "aria-label": label });
  const drawing = canvas.getContext("2d");
  drawing.fillStyle = styled("--accent");
  const columns = found.x.length;
  const shown = Array.from({ length: rows }, () => Array(columns).fill(null));
  found.mean.forEach((values, rank) => {
    const row = shown[Math.floor((rank * rows) / found.ranks.length)];
    values.forEach((value, i) => {
      if (value !== null && (row[i] === null || value > row[i])) row[i] = value;
    });
  });
  shown.forEach((values, row) =>
    values.forEach((value, i) => {
      if (value === null) return;
      drawing.globalAlpha = 0.08 + (0.92 * (value - low)) / (high - low || 1);
      const left = Math.round((WIDTH * i) / columns);
      drawing.fillRect(left, row * cell, Math.round((WIDTH * (i + 1)) / columns) - left, cell);
    }),
  );
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const rank = Math.floor(((event.clientY - box.top) / box.height) * found.ranks.length);
    const i = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const mean = found.mean[rank]?.[i];
    if (mean === undefined) return;
    const where = found.nodes[rank] === null ? "" : ` on ${found.nodes[rank]}`;
    told.textContent = `Rank ${found.ranks[rank]}${where}, up to step ${number(found.x[i])}: ${write(mean)}, at most ${write(found.max[rank][i])}.`;
  });
  return canvas;
}

function memoryOf(found) {
  const rows = found.map((each) => [
    number(each.rank),
    each.node ?? "",
    each.device ?? "",
    bytes(each.used),
    bytes(each.reserved),
    bytes(each.free),
    bytes(each.most_used),
    bytes(each.least_free),
  ]);
  return section("Memory", table(["rank", "node", "device", "used", "reserved", "free", "most used", "least free"], rows));
}
