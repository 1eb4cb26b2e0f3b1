// A sweep's trials as lines across its values: one axis for each value that is varied, the metric last.

import { follow, get, number, svg } from "./common.js";
import { refresh } from "./live.js";

const WIDTH = 1000;
const HEIGHT = 300;
const TOP = 28;
const BOTTOM = HEIGHT - 28;
const SIDE = 70;
const SHADES = 5; // of the lines, by how good their trial is

const place = document.getElementById("lines");

/** {name, ticks: [[text, y]], at: value -> y, null where it has none} */
function axis(name, values) {
  const there = values.filter((value) => value !== null && value !== undefined);
  if (there.length && there.every((value) => typeof value === "number")) return scale(name, there);
  const kinds = [...new Set(there.map(String))].sort();
  const at = (value) => {
    const rank = kinds.indexOf(String(value));
    return value === null || value === undefined ? null : spread(kinds.length > 1 ? rank / (kinds.length - 1) : 0.5);
  };
  return { name, at, ticks: kinds.map((kind) => [kind, at(kind)]) };
}

function scale(name, values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  // What spans a factor of more than twenty was most likely drawn on a logarithmic scale.
  const bend = low > 0 && high / low > 20 ? Math.log : (value) => value;
  const range = bend(high) - bend(low) || 1;
  const at = (value) => {
    if (typeof value !== "number") return null;
    return spread(low === high ? 0.5 : (bend(value) - bend(low)) / range);
  };
  return { name, at, ticks: low === high ? [[number(low), at(low)]] : [[number(low), at(low)], [number(high), at(high)]] };
}

function spread(share) {
  return BOTTOM - share * (BOTTOM - TOP);
}

function draw(sweep) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Trials across their values; the table below has the numbers" });
  const axes = [
    ...sweep.keys.map((key) => axis(key, sweep.trials.map((trial) => trial.values[key]))),
    axis(sweep.metric, sweep.trials.map((trial) => trial.value)),
  ];
  const x = (i) => SIDE + (i * (WIDTH - 2 * SIDE)) / Math.max(axes.length - 1, 1);
  const done = sweep.trials.filter((trial) => trial.value !== null).length;
  // The table has the best first: drawn last, they lie on top.
  sweep.trials.map((trial, rank) => [trial, rank]).reverse().forEach(([trial, rank]) => {
    const points = axes
      .map((each, i) => [x(i), each.at(i < sweep.keys.length ? trial.values[sweep.keys[i]] : trial.value)])
      .filter(([, y]) => y !== null);
    const shade = trial.value === null ? "open" : `${Math.min(SHADES - 1, Math.floor((SHADES * rank) / Math.max(done, 1)))}`;
    const line = svg("polyline", { points: points.map((point) => point.join(",")).join(" "), class: rank === 0 && done ? "best" : "", "data-shade": shade, "data-trial": trial.trial });
    line.append(svg("title", { text: `${trial.run}: ${sweep.metric} ${number(trial.value)}` }));
    drawing.append(line);
  });
  axes.forEach((each, i) => {
    drawing.append(svg("line", { x1: x(i), x2: x(i), y1: TOP, y2: BOTTOM, class: "axis" }));
    drawing.append(svg("text", { x: x(i), y: HEIGHT - 8, class: "name", text: each.name }));
    for (const [text, y] of each.ticks) drawing.append(svg("text", { x: x(i) + 5, y: y === TOP ? y - 5 : y + 4, class: "tick", text }));
  });
  place.replaceChildren(drawing);
}

async function show() {
  try {
    draw(await get(`/api/sweeps/${encodeURIComponent(place.dataset.sweep)}`));
  } catch (error) {
    place.textContent = error.message;
  }
}

// A trial's row and its line are told together.
function tell(event) {
  const trial = event.target.closest?.("[data-trial]")?.dataset.trial;
  for (const marked of document.querySelectorAll("[data-trial]")) {
    marked.classList.toggle("told", trial !== undefined && marked.dataset.trial === trial);
  }
}

document.addEventListener("pointerover", tell);
document.addEventListener("focusin", tell);
show();
follow("/api/stream", { runs: () => refresh(show) });
