// Curves of several runs in one chart.

import { duration, get, number, short, styled } from "./common.js";

const place = document.getElementById("chart");
const HEIGHT = 380;
const LOGARITHMIC = 3; // uPlot's number for it

function seconds(value) {
  return duration(value);
}

async function draw() {
  const { runs, metric, x, log } = place.dataset;
  place.replaceChildren();
  let found;
  try {
    found = await get("/api/compare", { runs, metric, x });
  } catch (error) {
    place.textContent = error.message;
    return;
  }
  const data = uPlot.join(found.runs.map((run) => [run.x, run.y]));
  const along = x === "time" ? seconds : short;
  const axis = { stroke: styled("--muted"), grid: { stroke: styled("--line"), width: 1 }, ticks: { show: false } };
  const series = found.runs.map((run, i) => ({
    label: run.run,
    stroke: styled(`--curve-${i + 1}`),
    width: 1.5,
    spanGaps: true,
    points: { show: run.x.length === 1 },
    value: (_, value) => number(value),
  }));
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false }, y: log ? { distr: LOGARITHMIC } : {} },
    axes: [
      { ...axis, values: (_, values) => values.map((value) => (value === null ? null : along(value))) },
      { ...axis, size: 64, values: (_, values) => values.map((value) => (value === null ? null : short(value))) },
    ],
    series: [{ label: found.unit || x, value: (_, value) => (value === null ? "–" : along(value)) }, ...series],
    legend: { show: true, live: true },
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
