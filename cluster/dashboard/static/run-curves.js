// All metrics of a run, in groups by the first part of their names.

import { AXES } from "./charts.js";
import { el } from "./common.js";

const OWN = { loss: "Training", lr: "Training", grad_norm: "Training", items: "Training", skipped: "Training", examples: "Training" };
const FIRST = ["Training", "validation", "Speed", "Memory"];
const SMOOTH = [1, 5, 20, 100, 500, 2000];

export class Curves {
  constructor(host, context) {
    this.context = context;
    this.shown = new Set();
    this.groups = new Map(); // name -> its element
    const { view, charts, choose, chosen } = context;

    const axes = Object.keys(AXES).map((x) =>
      el("button", { type: "button", "aria-pressed": String(view.x === x), text: { step: "Steps", tokens: "Tokens", time: "Time" }[x], on: {
        click: () => {
          choose({ x: x === "step" ? null : x, from: null, to: null });
          view.from = view.to = null;
          for (const [i, key] of Object.keys(AXES).entries()) axes[i].setAttribute("aria-pressed", String(key === x));
          charts.moveToAxis(x);
          this.showRange();
        },
      } }),
    );
    this.tokens = axes[1];
    const log = el("button", { type: "button", "aria-pressed": String(view.log), text: "Log", title: "Logarithmic heights", on: {
      click: () => {
        view.log = !view.log;
        choose({ log: view.log ? "1" : null });
        log.setAttribute("aria-pressed", String(view.log));
        charts.redrawAll();
      },
    } });
    const widths = SMOOTH.includes(view.smooth) ? SMOOTH : [...SMOOTH, view.smooth].sort((a, b) => a - b);
    const smooth = el("select", { "aria-label": "Smoothing", on: {
      change: () => {
        view.smooth = Number(smooth.value);
        choose({ smooth: view.smooth > 1 ? view.smooth : null });
        charts.refresh();
      },
    } }, ...widths.map((width) => el("option", { value: width, selected: width === view.smooth, text: width === 1 ? "none" : `mean of ${width}` })));
    const range = (key, label) => el("input", { type: "number", step: "any", "aria-label": label, placeholder: label, on: {
      change: (event) => charts.zoomed(...["from", "to"].map((each) => (each === key ? numberOf(event.target) : view[each]))),
    } });
    [this.from, this.to] = [range("from", "from"), range("to", "to")];
    this.whole = el("button", { type: "button", text: "Whole run", on: { click: () => charts.zoomed(null, null) } });
    this.filter = el("input", { type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", value: chosen.get("filter") ?? "", on: {
      input: () => {
        choose({ filter: this.filter.value });
        this.sift();
      },
    } });
    this.none = el("p", { class: "empty", hidden: true });
    this.list = el("div");
    host.append(
      el("div", { class: "toolbar" }, this.filter, el("span", { class: "choices", role: "group", "aria-label": "Axis" }, ...axes), log,
        el("label", {}, "Smoothing", smooth), el("span", { class: "grow" }), this.from, this.to, this.whole),
      this.none, this.list,
      el("p", { class: "faint small", text: "A band reaches from the smallest to the largest value, whatever line is drawn over it. Red marks: values that are not finite. Grey: rolled back, or repeated later. Dashed: a restart. Drag over a chart to look closer, double-click to see the whole run." }),
    );
    this.showRange();
  }

  open() {
    this.sift();
  }

  /** Charts for the metrics that have none yet. */
  addNew() {
    this.tokens.hidden = this.context.charts.tokensPerStep === null;
    for (const metric of this.context.metrics) {
      if (this.shown.has(metric)) continue;
      this.shown.add(metric);
      this.group(groupOf(metric)).querySelector(".charts").append(this.context.charts.add(metric));
    }
    this.sift();
  }

  group(name) {
    if (!this.groups.has(name)) {
      this.groups.set(name, el("section", { class: "group" }, el("h2", {}, name, el("span", { class: "faint" })), el("div", { class: "charts" })));
      const rank = (each) => (FIRST.includes(each) ? FIRST.indexOf(each) : FIRST.length);
      const sorted = [...this.groups].sort(([a], [b]) => rank(a) - rank(b) || a.localeCompare(b));
      this.list.replaceChildren(...sorted.map(([, element]) => element));
    }
    return this.groups.get(name);
  }

  sift() {
    const wanted = this.filter.value.trim().toLowerCase();
    let any = 0;
    for (const group of this.groups.values()) {
      const charts = [...group.querySelectorAll(".chart")];
      for (const chart of charts) chart.hidden = !chart.dataset.metric.toLowerCase().includes(wanted);
      const left = charts.filter((chart) => !chart.hidden).length;
      group.hidden = left === 0;
      group.querySelector("h2 span").textContent = left;
      any += left;
    }
    this.none.hidden = any > 0;
    this.none.textContent = wanted ? "No metric has this in its name." : "No step has been recorded yet.";
  }

  showRange() {
    const { from, to, x } = this.context.view;
    this.from.value = from ?? "";
    this.to.value = to ?? "";
    this.from.hidden = this.to.hidden = x === "time"; // nobody types epoch seconds: drag over a chart
    this.whole.disabled = from === null && to === null;
  }
}

function numberOf(input) {
  return input.value === "" ? null : Number(input.value);
}

function groupOf(metric) {
  if (metric.includes("/")) return metric.slice(0, metric.indexOf("/"));
  if (metric.startsWith("memory")) return "Memory";
  return OWN[metric] ?? (/(_s|_s_max|mfu)$/.test(metric) ? "Speed" : "Training");
}
