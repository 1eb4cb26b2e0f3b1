// How a run stands with its data: its position, what it waits for, what its mixture is made of, and what a step took.

import { ago, el, number } from "./common.js";
import { StepExamples } from "./run-examples.js";

const HINTS = { Mixture: "dashed: as planned", Waiting: "of a step's time, what the loader took", Reading: "from a remote store" };

export class DataPart {
  constructor(host, context) {
    this.host = host;
    this.context = context;
    this.shown = new Set();
    this.charts = { Position: [], Waiting: [], Mixture: [], Reading: [] };
    this.groups = Object.fromEntries(
      Object.keys(this.charts).map((name) => [name, el("section", { class: "group", hidden: true }, el("h2", {}, name, el("span", { class: "faint", text: HINTS[name] ?? "" })), el("div", { class: "charts" }))]),
    );
    this.left = el("div");
    this.none = el("p", { class: "empty", text: "Nothing is recorded of its data yet." });
    host.append(this.none, ...Object.values(this.groups), this.left);
    this.examples = new StepExamples(host, context);
  }

  open() {
    this.take();
    this.examples.open();
  }

  addNew() {
    const metrics = this.context.metrics;
    for (const metric of metrics) {
      const group = partOf(metric);
      if (group === null || this.shown.has(metric) || metric.endsWith("/planned_share")) continue;
      this.shown.add(metric);
      const planned = `${metric.slice(0, -"share".length)}planned_share`;
      const mixed = group === "Mixture" && metrics.includes(planned);
      const chart = this.context.charts.add(metric, mixed ? { title: metric.slice("data/".length), planned } : {});
      this.groups[group].querySelector(".charts").append(chart);
      this.groups[group].hidden = false;
      this.none.hidden = true;
    }
  }

  /** What was left out of the data. */
  take() {
    const events = this.context.events.filter((event) => ["data_skipped", "rolled_back"].includes(event.kind));
    const row = (event) => {
      const what = event.kind === "data_skipped"
        ? `${number(event.blocks?.length ?? 0)} damaged blocks, from example ${number(event.position)} on`
        : `examples ${number(event.left_out?.[0])} to ${number(event.left_out?.[1])}, after the loss diverged`;
      return el("tr", {}, el("td", { class: "number", text: number(event.step) }), el("td", { text: what }), el("td", {}, ago(event.time)));
    };
    this.left.replaceChildren();
    if (!events.length) return;
    const head = el("tr", {}, el("th", { class: "number", text: "Step" }), el("th", { text: "Left out" }), el("th", { text: "When" }));
    this.left.append(el("h2", { text: "Left out" }), el("div", { class: "panel table" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...events.map(row)))));
  }
}

function partOf(metric) {
  if (metric === "examples" || metric === "data/skipped_blocks") return "Position";
  if (metric === "data_wait_s" || metric === "step_s") return "Waiting";
  if (!metric.startsWith("data/")) return null;
  if (metric.endsWith("wait_s")) return "Waiting";
  return metric.endsWith("share") ? "Mixture" : "Reading";
}
