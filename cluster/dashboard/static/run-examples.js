// The examples that a step trained on, as the data sets have them. They are asked for, since each look takes seconds.

import { el, get, number } from "./common.js";

export class StepExamples {
  constructor(host, context) {
    this.context = context;
    this.step = el("input", { type: "number", name: "step", min: "1", required: true });
    this.button = el("button", { text: "Show" });
    this.shown = el("div", { "aria-live": "polite" });
    const form = el("form", { class: "toolbar", id: "examples", on: { submit: (event) => this.submit(event) } }, el("label", {}, "Step ", this.step), this.button);
    const command = el("code", { text: `shardyard replay ${context.name} --step N` });
    host.append(
      el("h2", {}, "Examples of a step", el("span", { class: "faint", text: "as they are stored, before augmentation" })), form, this.shown,
      el("p", { class: "muted small" }, "With the loss of each, by running the model again: ", command),
    );
  }

  /** Of the step that the address has, else offer the newest. */
  open() {
    if (this.step.value) return;
    this.step.value = this.context.chosen.get("step") ?? this.context.newest() ?? "";
    if (this.context.chosen.has("step")) this.load();
  }

  submit(event) {
    event.preventDefault();
    this.context.choose({ step: this.step.value });
    this.load();
  }

  async load() {
    this.button.disabled = true;
    this.shown.replaceChildren(el("p", { class: "muted", text: "reading …" }));
    try {
      this.show(await get(`${this.context.path}/steps/${encodeURIComponent(this.step.value)}/examples`));
    } catch (error) {
      this.shown.replaceChildren(el("p", { class: "notice bad", text: error.message }));
    } finally {
      this.button.disabled = false;
    }
  }

  show({ step, total, examples }) {
    const what = examples.length < total ? `the first ${number(examples.length)} of ${number(total)}` : `${number(total)}`;
    this.shown.replaceChildren(el("p", { class: "muted", text: `Step ${number(step)} took ${what} examples.` }), ...examples.map(article));
  }
}

function article({ sample_id, dataset, file, rows, values }) {
  const page = `/datasets/${encodeURIComponent(dataset)}?split=train&first=`;
  const links = rows.flatMap((row, i) => [i ? ", " : " ", el("a", { href: page + row, text: number(row) })]);
  const from = el("span", { class: "muted wrap" }, values.key ? `${values.key}, ` : "", `${dataset}/${file}`, ...(links.length ? [rows.length > 1 ? ", rows" : ", row", ...links] : []));
  const columns = Object.entries(values).filter(([column]) => column !== "key");
  return el("article", { class: "panel example", "data-example": sample_id },
    el("header", {}, el("h3", { text: number(sample_id) }), from),
    el("dl", { class: "inside values" }, ...columns.map(([column, value]) => el("div", {}, title(column, value), el("dd", {}, content(column, value))))));
}

function title(column, value) {
  const size = value?.shape?.join(" × ") ?? (value?.length === undefined ? null : `${number(value.length)} long`);
  return el("dt", {}, `${column} `, size === null ? null : el("span", { class: "faint", text: size }));
}

function content(column, value) {
  if (value === null || typeof value !== "object") return typeof value === "string" ? value : number(value);
  if (value.text !== undefined) return el("pre", { class: "text", text: value.text + (value.length > value.text.length ? "…" : "") });
  if (value.picture !== undefined) return el("img", { src: value.picture, alt: column, loading: "lazy" });
  const first = el("code", { text: `${[value.first].flat().join(" ")} …` });
  if (value.dtype === undefined) return first;
  return el("span", {}, first, el("span", { class: "muted", text: ` ${value.dtype}, ${number(value.least)} to ${number(value.greatest)}` }));
}
