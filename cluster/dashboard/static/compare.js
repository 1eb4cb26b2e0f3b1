// Curves of several runs in one chart.

import { duration, get, number, short, styled } from "./common.js";

const place = document.getElementById("chart");
const HEIGHT = 380;
const LOGARITHMIC = 3; // uPlot's number for it

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
    value.textContent = there ? number(valueAt(chart.data, i + 1, idx)) : "";
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

async function draw() {
  const { runs, metric, x, log, calm } = place.dataset;
  place.replaceChildren();
  let found;
  try {
    found = await get("/api/compare", { runs, metric, x });
  } catch (error) {
    place.textContent = error.message;
    return;
  }
  const data = uPlot.join(found.runs.map((run) => [run.x, run.y]));
  const along = x === "time" ? duration : (value) => (x === "step" ? `step ${number(value)}` : `${number(value)} ${found.unit}`);
  const axis = { stroke: styled("--muted"), grid: { stroke: styled("--line"), width: 1 }, ticks: { show: false } };
  const series = found.runs.map((run, i) => ({
    label: run.run,
    stroke: styled(`--curve-${i + 1}`),
    width: 1.5,
    spanGaps: true,
    points: { show: run.x.length === 1 },
  }));
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false }, y: { ...(log ? { distr: LOGARITHMIC } : {}), ...(calm ? { range: calmRange(data.slice(1)) } : {}) } },
    axes: [
      { ...axis, values: (_, values) => values.map((value) => (value === null ? null : x === "time" ? duration(value) : short(value))) },
      { ...axis, size: 64, values: (_, values) => values.map((value) => (value === null ? null : short(value))) },
    ],
    series: [{}, ...series],
    legend: { show: false },
    hooks: { setCursor: [(chart) => tell(chart, along)] },
    cursor: { drag: { x: true, y: false } },
  };
  const chart = new uPlot(options, data, place);
  new ResizeObserver(() => chart.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
}

for (const form of document.querySelectorAll("#view")) {
  form.addEventListener("change", () => form.requestSubmit());
}

document.getElementById("choose")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const chosen = new FormData(event.target).getAll("run").map(encodeURIComponent).join(",");
  location.href = `/compare?runs=${chosen}`;
});

if (place) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
