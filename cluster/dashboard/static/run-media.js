// What the model made, by step: text and pictures.

import { ago, el, number } from "./common.js";

const AT_ONCE = 24;

export class Media {
  constructor(host, context) {
    this.host = host;
    this.context = context;
    this.pages = { picture: 1, sample: 1 };
  }

  open() {
    this.take([{ kind: "picture" }]);
  }

  take(events) {
    if (!events.some((event) => ["picture", "sample"].includes(event.kind))) return;
    const newest = (kind) => this.context.events.filter((event) => event.kind === kind).reverse();
    const [pictures, samples] = [newest("picture"), newest("sample")];
    this.host.replaceChildren();
    if (!pictures.length && !samples.length) {
      this.host.append(el("p", { class: "empty", text: "There is no text and there are no pictures yet: a run records them at its end. evaluation.sample_tokens asks for text." }));
    }
    this.list("picture", "Pictures", pictures, "pictures", (event) => {
      const path = String(event.path).replace(/^pictures\//, "").split("/").map(encodeURIComponent).join("/");
      const text = `${event.name} after step ${number(event.step)}`;
      const source = `${this.context.path}/pictures/${path}`;
      return el("figure", { class: "panel" },
        el("a", { href: source, target: "_blank", rel: "noopener" }, el("img", { src: source, alt: text, loading: "lazy" })),
        el("figcaption", {}, text, " · ", ago(event.time)));
    });
    this.list("sample", "Text", samples, "samples", (event) =>
      el("section", { class: "panel" },
        el("header", {}, el("h3", { text: `Step ${number(event.step)}` }), el("span", { class: "muted small" }, ago(event.time))),
        el("div", { class: "inside sample", tabindex: "0", text: event.text })));
  }

  list(kind, title, events, style, draw) {
    if (!events.length) return;
    const shown = events.slice(0, AT_ONCE * this.pages[kind]);
    this.host.append(el("h2", { text: title }), el("div", { class: style }, ...shown.map(draw)));
    if (shown.length === events.length) return;
    const more = () => {
      this.pages[kind]++;
      this.open();
    };
    this.host.append(el("p", {}, el("button", { type: "button", text: `Older ones (${number(events.length - shown.length)})`, on: { click: more } })));
  }
}
