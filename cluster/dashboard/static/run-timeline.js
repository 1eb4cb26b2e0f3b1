// What happened to a run: drawn, a lane for each attempt, and as a table.

import { ago, bytes, duration, el, exact, number, svg } from "./common.js";

const LANE = 26;
const LEFT = 84;
const RIGHT = 16;
const AT_ONCE = 200;
const OWN = new Set(["time", "attempt", "kind", "step", "text"]);

export class Timeline {
  constructor(host, context) {
    this.context = context;
    this.pages = 1;
    this.drawing = el("div", { class: "inside timeline" });
    this.rows = el("tbody");
    this.kind = el("select", { "aria-label": "Kind of event", on: { change: () => this.fill() } });
    this.more = el("button", { type: "button", on: { click: () => { this.pages++; this.fill(); } } });
    const legend = [["waiting", "waiting for room"], ["starting", "starting"], ["training", "training"], ["end-failed", "failed"], ["end-finished", "finished"]];
    const head = ["When", "Attempt", "Step", "What", "More"].map((name) => el("th", { scope: "col", class: ["Attempt", "Step"].includes(name) ? "number" : null, text: name }));
    host.append(
      el("section", { class: "panel" }, this.drawing,
        el("div", { class: "inside legend" }, ...legend.map(([style, text]) => el("span", { class: "timeline" }, svg("svg", {}, svg("rect", { width: 12, height: 10, rx: 2, class: style })), text)), el("span", { text: "gaps in a bar: checkpoints" }))),
      el("div", { class: "toolbar" }, el("label", {}, "Events", this.kind)),
      el("div", { class: "panel table" }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), this.rows)),
      el("p", {}, this.more),
    );
    new ResizeObserver(() => this.draw()).observe(this.drawing);
  }

  open() {
    this.take();
  }

  take() {
    const kinds = [...new Set(this.context.events.map((event) => event.kind))].sort();
    const wanted = this.kind.value;
    this.kind.replaceChildren(el("option", { value: "", text: "all" }), ...kinds.map((kind) => el("option", { value: kind, selected: kind === wanted, text: kind })));
    this.draw();
    this.fill();
  }

  // --- drawn

  draw() {
    const width = this.drawing.clientWidth - 24;
    const events = this.context.events;
    if (width < 200 || !events.length) return;
    const start = events[0].time;
    const goesOn = this.context.status() === "running" || this.context.status() === "queued";
    const end = Math.max(goesOn ? Date.now() / 1000 : 0, ...events.slice(-200).map((event) => event.time), start + 1);
    const at = (time) => LEFT + ((time - start) / (end - start)) * (width - LEFT - RIGHT);
    const attempts = new Map();
    for (const event of events) {
      if (!attempts.has(event.attempt)) attempts.set(event.attempt, []);
      attempts.get(event.attempt).push(event);
    }
    const height = LANE * attempts.size + 24;
    const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "What happened, over time; the table below tells the same" });
    for (const time of ticks(start, end, Math.max(2, Math.floor(width / 140)))) {
      made.append(
        svg("line", { class: "rule", x1: at(time), x2: at(time), y1: 0, y2: height - 20 }),
        svg("text", { class: "tick", x: at(time), y: height - 6, "text-anchor": "middle", text: time === start ? "0s" : duration(time - start).replace(/ 0.$/, "") }),
      );
    }
    const numbers = [...attempts.keys()];
    for (const [lane, [attempt, own]] of [...attempts].entries()) {
      const next = attempts.get(numbers[lane + 1])?.[0].time;
      this.lane(made, lane * LANE + 4, attempt, own, next ?? end, at);
    }
    this.drawing.replaceChildren(made);
  }

  lane(made, top, attempt, events, until, at) {
    const first = (kind) => events.find((event) => event.kind === kind)?.time;
    const ended = events.findLast((event) => ["finished", "stopped", "failed"].includes(event.kind));
    const stop = ended?.time ?? until;
    const [begun, placed, started] = [events[0].time, first("placed"), first("started")];
    made.append(svg("text", { class: "lane", x: 0, y: top + 13, text: attempt ? `Attempt ${attempt}` : "Before" }));
    const bar = (style, from, to, text) => {
      if (from === undefined || to <= from) return;
      const rect = svg("rect", { class: style, x: at(from), y: top + 2, width: Math.max(1, at(to) - at(from)), height: LANE - 12, rx: 2 });
      rect.append(svg("title", { text: `${text}: ${duration(to - from)}` }));
      made.append(rect);
    };
    bar("waiting", begun, placed ?? started ?? stop, attempt ? "waiting for room" : "preparing");
    bar("starting", placed, started ?? stop, "starting");
    bar("training", started, stop, "training");
    for (const event of events) {
      const x = at(event.time);
      const title = svg("title", { text: `${event.kind}${event.step === undefined ? "" : ` at step ${event.step}`}: ${exact(event.time)}` });
      if (event.kind === "checkpoint") made.append(svg("line", { class: "checkpoint", x1: x, x2: x, y1: top + 2, y2: top + LANE - 10 }, title));
      else if (event === ended) made.append(svg("circle", { class: `end-${event.kind}`, cx: x, cy: top + LANE / 2 - 4, r: 6 }, title));
      else if (/diverged|damaged|failed|rolled_back|skipped|resized/.test(event.kind)) made.append(svg("circle", { class: "other", cx: x, cy: top + LANE / 2 - 4, r: 4 }, title));
    }
  }

  // --- as a table

  fill() {
    const wanted = this.context.events.filter((event) => !this.kind.value || event.kind === this.kind.value).reverse();
    const shown = wanted.slice(0, AT_ONCE * this.pages);
    this.rows.replaceChildren(
      ...shown.map((event) =>
        el("tr", { class: `event-${event.kind}` },
          el("td", { class: "fit" }, ago(event.time)),
          el("td", { class: "number fit", text: event.attempt || "" }),
          el("td", { class: "number fit", text: event.step === undefined || event.step === null ? "" : number(event.step) }),
          el("td", { class: "fit", text: event.kind }),
          el("td", { class: "wrap muted", text: told(event) }))),
    );
    this.more.hidden = shown.length === wanted.length;
    this.more.textContent = `Older ones (${number(wanted.length - shown.length)})`;
  }
}

/** The rest of an event in words. */
function told(event) {
  if (event.kind === "failed") return [event.summary || event.error, event.decision ? `Then: ${event.decision}` : ""].filter(Boolean).join(" ");
  const parts = [];
  if (event.kind === "sample") parts.push(`${String(event.text).slice(0, 120)} …`);
  for (const [key, value] of Object.entries(event)) {
    if (OWN.has(key) || value === null) continue;
    if (Array.isArray(value)) parts.push(`${value.length} ${key}`);
    else if (typeof value === "object") continue;
    else if (key.endsWith("_bytes")) parts.push(`${key.slice(0, -6)} ${bytes(value)}`);
    else if (key.endsWith("_s") && !key.endsWith("per_s")) parts.push(`${key.slice(0, -2)} ${duration(value)}`);
    else parts.push(`${key} ${typeof value === "number" ? number(value) : value}`);
  }
  return parts.join(" · ");
}

/** Round lengths of time from the start on. */
function ticks(start, end, most) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
  const step = steps.find((each) => (end - start) / each <= most) ?? (end - start) / most;
  const found = [];
  for (let time = start; time <= end; time += step) found.push(time);
  return found;
}
