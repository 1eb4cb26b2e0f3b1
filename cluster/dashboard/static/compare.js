// Curves of several runs in one chart. While one of them runs, the page and the chart are brought up to date.

import { alpha, duration, get, number, short, styled } from "./common.js";
import { refresh } from "./live.js";

const place = document.getElementById("chart");
const HEIGHT = 380;
const LOGARITHMIC = 3; // uPlot's number for it
const EVERY_MS = 3000;

let zoomed = false; // by the reader

/** From the hundredth part of the values to all but the hundredth part: what a few that stand out do not stretch. */
function calmRange(columns) {
  const sorted = columns.flat().filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const low = sorted[Math.floor(0.01 * (sorted.length - 1))];
  const high = sorted[Math.ceil(0.99 * (sorted.length - 1))];
  const room = 0.05 * (high - low) || Math.abs(high) || 1;
  return [low - room, high + room];
}

/** The values under the pointer, beside the names of their runs. */
function tell(chart, along) {
  const { idx } = chart.cursor;
  const there = idx !== null && idx !== undefined;
  const legend = place.parentElement.querySelector(".legend");
  legend.querySelectorAll(".value").forEach((value, i) => {
    value.textContent = there ? number(valueAt(chart.data, EACH * (i + 1), idx)) : "";
  });
  legend.querySelector(".at").textContent = there ? `at ${along(chart.data[0][idx])}` : "";
}

/** Runs have values at different places: the last one up to there, but none past a run's end. */
function valueAt(data, series, idx) {
  const values = data[series];
  const isThere = (value) => value !== null && value !== undefined;
  if (!values.slice(idx).some(isThere)) return null;
  return values.slice(0, idx + 1).findLast(isThere);
}

function ask() {
  const { runs, metric, x } = place.dataset;
  return get("/api/compare", { runs, metric, x });
}

const EACH = 3; // series a run: its least and greatest values, between which nothing is hidden, and its mean

const joined = (found) => uPlot.join(found.runs.map((run) => [run.x, run.low, run.high, run.y]));

async function draw() {
  const { x, log, calm } = place.dataset;
  let found;
  try {
    found = await ask();
  } catch (error) {
    place.textContent = error.message;
    return;
  }
  place.chart?.destroy();
  place.replaceChildren();
  zoomed = false;
  const along = x === "time" ? duration : (value) => (x === "step" ? `step ${number(value)}` : `${number(value)} ${found.unit}`);
  const axis = { stroke: styled("--muted"), grid: { stroke: styled("--line"), width: 1 }, ticks: { show: false } };
  const colours = found.runs.map((_, i) => styled(`--curve-${i + 1}`));
  const series = found.runs.flatMap((run, i) => {
    const edge = { stroke: alpha(colours[i], 0.3), width: 1, spanGaps: true, points: { show: false } };
    return [edge, edge, { label: run.run, stroke: colours[i], width: 1.5, spanGaps: true, points: { show: run.x.length === 1 } }];
  });
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false }, y: { ...(log ? { distr: LOGARITHMIC } : {}), ...(calm ? { range: (plot) => calmRange(plot.data.slice(1)) } : {}) } },
    axes: [
      { ...axis, values: (_, values) => values.map((value) => (value === null ? null : x === "time" ? duration(value) : short(value))) },
      { ...axis, size: 64, values: (_, values) => values.map((value) => (value === null ? null : short(value))) },
    ],
    series: [{}, ...series],
    bands: colours.map((colour, i) => ({ series: [EACH * i + 2, EACH * i + 1], fill: alpha(colour, 0.1) })),
    legend: { show: false },
    hooks: { setCursor: [(plot) => tell(plot, along)], setSelect: [(plot) => (zoomed = plot.select.width > 0)] },
    cursor: {
      drag: { x: true, y: false },
      bind: {
        dblclick: (_, __, zoomOut) => (event) => {
          zoomed = false;
          return zoomOut(event);
        },
      },
    },
  };
  place.chart = new uPlot(options, joined(found), place);
}

/** Draw what has come since, between the same ends where the reader has zoomed. */
async function extend() {
  if (!place.chart) return draw();
  const data = joined(await ask());
  const { chart } = place;
  const { min, max } = chart.scales.x;
  chart.setData(data, !zoomed);
  if (zoomed) chart.setScale("x", { min, max }); // and the heights of what is seen
}

for (const form of document.querySelectorAll("#view")) {
  form.addEventListener("change", () => form.requestSubmit());
}

document.getElementById("choose")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const chosen = new FormData(event.target).getAll("run").map(encodeURIComponent).join(",");
  location.href = `/compare?runs=${chosen}`;
});

let running = true; // when the chart was last drawn, so that what came before an end is drawn too

function follow() {
  const runs = () => document.getElementById("live").hasAttribute("data-running");
  if (!running && !runs()) return;
  refresh(async () => {
    running = runs();
    await extend().catch(() => (running = true)); // the server is away: the next time
  });
}

if (place) {
  draw();
  new ResizeObserver(() => place.chart?.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
  setInterval(follow, EVERY_MS);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
