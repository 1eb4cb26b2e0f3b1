// Where a run's time goes: parts of its steps, and its ranks beside each other.

import { seconds, writer } from "./charts.js";
import { bytes, duration, el, get, number, percent, short, styled, svg } from "./common.js";

const UPLOT = window.uPlot;
const EVERY_MS = 5000; // while it is open and the run is at work
const SLOW = 1.3; // times the median rank's: worth a look
const SAID = {
  data: "waits for examples", forward: "forward", backward: "backward", collective: "waits for other ranks",
  optimizer: "optimizer", checkpoint: "waits for saves", evaluation: "evaluation", other: "other work",
};

export class Speed {
  constructor(host, context) {
    this.host = host;
    this.context = context;
    this.drawing = el("div", { class: "drawing tall", role: "img", "aria-label": "Seconds a step, stacked by what they are spent on; the table beside it tells the sums" });
    this.totals = el("tbody");
    this.metric = el("select", { "aria-label": "What is shown of the ranks", on: { change: () => this.load() } });
    this.told = el("span", { class: "values" });
    this.canvas = el("canvas", { class: "heat", role: "img" });
    this.slowest = el("tbody");
    this.memory = el("tbody");
    this.problem = el("div");
    const head = (...names) => el("thead", {}, el("tr", {}, ...names.map(([name, style]) => el("th", { scope: "col", class: style, text: name }))));
    host.append(
      this.problem,
      el("h2", { text: "Where a step's time goes" }),
      el("div", { class: "side" },
        el("section", { class: "panel chart" }, this.drawing),
        el("div", { class: "panel table" }, el("table", {}, head(["Part"], ["Share", "number"], ["In all", "number"]), this.totals))),
      el("h2", { text: "Ranks" }),
      el("div", { class: "side" },
        el("section", { class: "panel chart" }, el("header", {}, this.metric, this.told), el("div", { class: "inside" }, this.canvas)),
        el("div", { class: "panel table" }, el("table", {}, head(["Rank", "number"], ["Node"], ["Own time a step", "number"], ["Of the median", "number"]), this.slowest))),
      el("p", { class: "faint small", text: "A rank's own time is without its waits for others: all ranks end a step together, and only this tells who holds the others up. The darker, the more." }),
      el("h2", { text: "Memory of the ranks" }),
      el("div", { class: "panel table" }, el("table", {}, head(["Rank", "number"], ["Node"], ["Device"], ["Used", "number"], ["Most used", "number"], ["Reserved", "number"], ["Free", "number"], ["Least free", "number"]), this.memory)),
    );
    this.canvas.addEventListener("mousemove", (event) => this.tell(event));
    this.canvas.addEventListener("mouseleave", () => this.told.replaceChildren());
    new ResizeObserver(() => this.draw()).observe(this.drawing);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  async open() {
    clearTimeout(this.timer);
    await this.load();
    const again = () => {
      if (!this.host.hidden && this.context.status() === "running") this.open();
    };
    this.timer = setTimeout(again, EVERY_MS);
  }

  async load() {
    const { view, path } = this.context;
    const range = view.x === "step" ? { start: view.from, stop: view.to } : {};
    try {
      const [split, ranks, memory] = await Promise.all([
        get(`${path}/performance`, range),
        get(`${path}/ranks`, { ...range, metric: this.metric.value || "own_s", buckets: 120 }),
        get(`${path}/memory`),
      ]);
      this.problem.replaceChildren();
      this.split = split;
      this.ranks = ranks;
      this.fill(memory);
      this.draw();
    } catch (error) {
      this.problem.replaceChildren(el("p", { class: "notice bad", text: error.message }));
    }
  }

  fill(memory) {
    const { order, totals } = this.split;
    const all = Object.values(totals).reduce((sum, each) => sum + each, 0);
    this.totals.replaceChildren(...order.map((part, i) =>
      el("tr", {}, el("td", {}, svg("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, rx: 2, fill: colour(i) })), SAID[part] ?? part),
        el("td", { class: "number", text: percent(all ? totals[part] / all : null) }), el("td", { class: "number", text: duration(totals[part]) }))));
    const { metric, metrics, slowest } = this.ranks;
    this.metric.replaceChildren(...metrics.map((each) => el("option", { value: each, selected: each === metric, text: each })));
    this.slowest.replaceChildren(...slowest.map(({ rank, node, own_s, factor }) =>
      el("tr", {}, el("td", { class: "number", text: rank }), el("td", { text: node ?? "" }), el("td", { class: "number", text: seconds(own_s) }),
        el("td", { class: `number ${factor >= SLOW ? "bad" : ""}`, text: `${number(factor)} ×` }))));
    this.memory.replaceChildren(...memory.map((each) =>
      el("tr", {}, el("td", { class: "number", text: each.rank }), el("td", { text: each.node ?? "" }), el("td", { text: each.device ?? "" }),
        ...["used", "most_used", "reserved", "free", "least_free"].map((what) => el("td", { class: "number", text: bytes(each[what]) })))));
  }

  draw() {
    if (this.split === undefined || this.drawing.clientWidth === 0) return;
    this.drawSplit();
    this.drawRanks();
  }

  drawSplit() {
    this.plot?.destroy();
    this.drawing.replaceChildren();
    const { order, x, parts } = this.split;
    if (!x.length) {
      this.drawing.append(el("div", { class: "over", text: "nothing here yet" }));
      return;
    }
    const sums = [];
    for (const [i, part] of order.entries()) sums.push(parts[part].map((value, at) => (value ?? 0) + (i ? sums[i - 1][at] : 0)));
    // The highest first: each covers what is below it.
    const series = order.map((part, i) => ({ label: part, stroke: colour(i), fill: colour(i), width: 0, points: { show: false } })).reverse();
    const axis = { stroke: styled("--muted"), font: "11px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: styled("--line"), width: 1 } };
    this.plot = new UPLOT({
      width: this.drawing.clientWidth - 8, height: this.drawing.clientHeight - 8, legend: { show: false }, padding: [10, 18, 0, 0],
      cursor: { show: false },
      scales: { x: { time: false }, y: { range: (_, __, high) => [0, high * 1.05] } },
      axes: [{ ...axis, size: 24, space: 70, values: (_, ticks) => ticks.map(short) }, { ...axis, size: 66, values: (_, ticks) => ticks.map(seconds) }],
      series: [{}, ...series],
    }, [x, ...sums.reverse()], this.drawing);
  }

  drawRanks() {
    const { ranks, x, mean } = this.ranks;
    const known = mean.flat().filter((value) => value !== null);
    const [low, high] = [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), -Infinity)];
    const width = this.canvas.parentElement.clientWidth - 24;
    const row = Math.max(2, Math.min(22, 400 / Math.max(1, ranks.length)));
    const ratio = devicePixelRatio;
    this.canvas.width = width * ratio;
    this.canvas.height = Math.max(row, row * ranks.length) * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${this.canvas.height / ratio}px`;
    this.canvas.setAttribute("aria-label", `${this.ranks.metric} of ${ranks.length} ranks over steps; the table tells the slowest`);
    const ink = this.canvas.getContext("2d");
    const cell = this.canvas.width / Math.max(1, x.length);
    ink.fillStyle = styled("--curve-2");
    for (const [i, values] of mean.entries()) {
      for (const [at, value] of values.entries()) {
        if (value === null) continue;
        ink.globalAlpha = 0.08 + 0.92 * (high > low ? (value - low) / (high - low) : 0);
        ink.fillRect(at * cell, i * row * ratio, cell + 0.5, (row - (row > 6 ? 1 : 0)) * ratio);
      }
    }
  }

  tell(event) {
    const { metric, ranks, nodes, x, mean, max } = this.ranks;
    const box = this.canvas.getBoundingClientRect();
    const at = Math.min(x.length - 1, Math.floor(((event.clientX - box.left) / box.width) * x.length));
    const i = Math.min(ranks.length - 1, Math.floor(((event.clientY - box.top) / box.height) * ranks.length));
    if (at < 0 || i < 0) return;
    const write = writer(metric);
    this.told.replaceChildren(`rank ${ranks[i]}${nodes[i] ? ` on ${nodes[i]}` : ""} · to step ${number(x[at])} · `, el("b", { text: write(mean[i][at]) }), ` at most ${write(max[i][at])}`);
  }
}

function colour(i) {
  return styled(`--curve-${(i % 8) + 1}`);
}
