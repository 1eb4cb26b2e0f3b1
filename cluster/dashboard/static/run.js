// The page of one run: its header, which the stream keeps up to date, and its parts, each in a file of its own. What
// the reader chose stands behind the # of the address: #curves?x=time&log=1.

import { ago, duration, el, follow, get, number, percent, post } from "./common.js";
import { Charts, seconds } from "./charts.js";
import { Curves } from "./run-curves.js";
import { Configuration } from "./run-config.js";
import { DataPart } from "./run-data.js";
import { Logs } from "./run-logs.js";
import { Media } from "./run-media.js";
import { Speed } from "./run-speed.js";
import { Timeline } from "./run-timeline.js";

const page = document.getElementById("run");
const name = page.dataset.name;
const path = `/api/runs/${encodeURIComponent(name)}`;
const tabs = [...page.querySelectorAll('[role="tab"]')];
const part = (tab) => tab.getAttribute("aria-controls");

// --- what the address says

function read() {
  const [tab, query = ""] = location.hash.slice(1).split("?");
  return { tab: tabs.some((each) => part(each) === tab) ? tab : "curves", chosen: new URLSearchParams(query) };
}

const OURS = "ours"; // marks what this page put into the browser's history
const chosen = read().chosen;

/** Keep what the reader chose; null and "" take it back. */
function choose(values) {
  for (const [key, value] of Object.entries(values)) {
    if (value === null || value === "" || value === false) chosen.delete(key);
    else chosen.set(key, value);
  }
  write();
}

function write(push = false) {
  const query = chosen.toString();
  const address = `#${selected}${query ? `?${query}` : ""}`;
  history[push ? "pushState" : "replaceState"](OURS, "", address);
}

const given = (key) => (chosen.has(key) && Number.isFinite(Number(chosen.get(key))) ? Number(chosen.get(key)) : null);
const view = {
  x: ["tokens", "time"].includes(chosen.get("x")) ? chosen.get("x") : "step",
  log: chosen.get("log") === "1",
  smooth: Math.max(1, Math.round(given("smooth") ?? 1)),
  from: given("from"),
  to: given("to"),
};

// --- the header

const field = (id) => document.getElementById(id);
let status = field("status").dataset.status;
let newest = null; // step

function show(summary) {
  status = summary.status;
  newest = summary.step;
  field("status").textContent = status;
  field("status").dataset.status = status;
  const workers = `${summary.workers} worker${summary.workers === 1 ? "" : "s"}`;
  field("where").textContent = summary.where ? `${workers} on ${summary.where}` : workers;
  field("progress").max = summary.steps;
  field("progress").value = summary.step ?? 0;
  field("steps").textContent = `${number(summary.step)} of ${number(summary.steps)} steps, ${percent(summary.step / summary.steps)}`;
  field("loss").textContent = number(summary.loss);
  field("tokens_per_s").textContent = number(summary.tokens_per_s === null ? null : Math.round(summary.tokens_per_s));
  field("step_s").textContent = seconds(summary.step_s);
  field("mfu").textContent = percent(summary.mfu);
  field("goodput").textContent = percent(summary.goodput);
  field("eta_s").textContent = duration(summary.eta_s);
  field("restarts").textContent = number(summary.restarts);
  field("started_at").replaceChildren(ago(summary.started_at));
  field("updated_at").replaceChildren(ago(summary.updated_at));
  field("attention").hidden = summary.attention.length === 0;
  field("attention").firstElementChild.replaceChildren(
    ...summary.attention.map((each) =>
      el("li", {}, el("span", { class: "badge", "data-kind": each.kind, text: each.kind }), el("span", { class: "wrap", text: each.text }), el("span", { class: "when" }, ago(each.time)))),
  );
  field("stop").hidden = !["running", "queued"].includes(status);
  field("resume").hidden = !["stopped", "failed", "lost"].includes(status);
}

async function ask(what, button) {
  button.disabled = true;
  const answer = field("answer");
  answer.replaceChildren(el("p", { class: "notice", text: "asking …" }));
  try {
    const { message } = await post(`${path}/${what}`);
    answer.replaceChildren(el("p", { class: "notice good", text: message }));
  } catch (error) {
    answer.replaceChildren(el("p", { class: "notice bad", text: error.message }));
  } finally {
    button.disabled = false;
  }
}

const dialog = field("ask-stop");
field("stop").addEventListener("click", () => {
  dialog.returnValue = "no";
  dialog.showModal();
});
dialog.addEventListener("close", () => {
  if (dialog.returnValue === "yes") ask("stop", field("stop"));
});
field("resume").addEventListener("click", () => ask("resume", field("resume")));

// --- its parts

const context = { name, path, chosen, choose, view, events: [], metrics: [], status: () => status, newest: () => newest };
context.charts = new Charts(path, view, zoom);
const parts = {
  curves: new Curves(field("curves"), context),
  speed: new Speed(field("speed"), context),
  timeline: new Timeline(field("timeline"), context),
  logs: new Logs(field("logs"), context),
  config: new Configuration(field("config"), context),
  media: new Media(field("media"), context),
  data: new DataPart(field("data"), context),
};
let selected = read().tab;

function zoom(from, to) {
  view.from = from;
  view.to = to;
  choose({ from, to });
  parts.curves.showRange();
  context.charts.redrawAll(); // at once with what is there, then at full detail
  context.charts.refresh();
}

function select(id, { push = false, focus = false } = {}) {
  selected = id;
  for (const tab of tabs) {
    const on = part(tab) === id;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    field(part(tab)).hidden = !on;
    if (on && focus) tab.focus();
  }
  write(push);
  parts[id].open();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(part(tab), { push: true }));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    select(part(next), { push: true, focus: true });
  });
}
addEventListener("popstate", (event) => {
  if (event.state === OURS) select(read().tab);
  else location.reload(); // an address that somebody typed or pasted
});

// --- what is there, then what comes: fetched once the stream has said that it begins, so that nothing falls between

const LATE_MS = 1000; // a stream that other pages keep waiting: a browser has few connections to a server
const BOUND = /^(loss|grad_norm)_(min|max|bad)$/; // drawn with the curve that they bound
const held = []; // what the stream tells before the rest is there
let ready = false;
let followed = false;

function tell(what) {
  if (ready) what();
  else held.push(what);
}

follow(`${path}/stream`, {
  summary: (summary) => {
    show(summary);
    if (!followed) begin();
    followed = true;
  },
  rows: (rows) => tell(() => {
    const names = rows.flatMap((row) => Object.keys(row.values)).filter((metric) => !context.metrics.includes(metric) && !BOUND.test(metric));
    if (names.length) {
      context.metrics.push(...new Set(names));
      parts.curves.addNew();
      parts.data.addNew();
    }
    context.charts.append(rows);
  }),
  events: (events) => tell(() => {
    const same = (one, other) => one.time === other.time && one.kind === other.kind && one.attempt === other.attempt;
    context.events.push(...events.filter((event) => !context.events.some((each) => same(each, event)))); // as it was fetched
    context.events.sort((a, b) => a.attempt - b.attempt || a.time - b.time); // they come as they are written
    parts[selected].take?.(events);
  }),
  reset: () => tell(begin),
});

async function begin() {
  try {
    await fetchAll();
  } catch (error) {
    field("answer").replaceChildren(el("p", { class: "notice bad", text: error.message }));
  }
}

async function fetchAll() {
  const [run, events] = await Promise.all([get(path), get(`${path}/events`)]);
  show(run);
  context.events = events;
  context.metrics = run.metrics;
  context.charts.tokensPerStep = run.tokens_per_step;
  context.charts.last = { attempt: events.at(-1)?.attempt ?? 0, step: 0 };
  ready = true;
  parts.curves.addNew();
  parts.data.addNew();
  context.charts.refresh();
  select(selected);
  for (const what of held.splice(0)) what();
}

setTimeout(() => followed || begin(), LATE_MS);
