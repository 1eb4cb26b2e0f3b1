// What the workers printed: one rank's log of one attempt, in pieces; the failure of the attempt stays in sight.

import { ago, bytes, el, get, number } from "./common.js";

const FOLLOW_EVERY_MS = 1000;
const MOST_LINES = 20000; // kept on the page

export class Logs {
  constructor(host, context) {
    this.host = host;
    this.context = context;
    this.generation = 0; // of what is shown: what was asked for before is not mixed into it
    const again = () => this.choose();
    this.attempt = el("select", { "aria-label": "Attempt", on: { change: () => { this.fillRanks(); again(); } } });
    this.rank = el("select", { "aria-label": "Rank", on: { change: again } });
    this.follow = el("button", { type: "button", "aria-pressed": "true", text: "Follow", title: "Keep to the end as it grows", on: { click: () => this.setFollow(this.follow.getAttribute("aria-pressed") !== "true") } });
    this.query = el("input", { type: "search", placeholder: "Search this log", "aria-label": "Search this log", value: context.chosen.get("search") ?? "" });
    this.facts = el("span", { class: "small" });
    this.pinned = el("div");
    this.older = el("button", { type: "button", text: "Older lines", on: { click: () => this.loadOlder() } });
    this.more = el("button", { type: "button", text: "Search on", hidden: true, on: { click: () => this.searchOn() } });
    this.list = el("div", { class: "lines" });
    this.box = el("div", { class: "panel log", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off" }, this.older, this.list, this.more);
    this.box.addEventListener("scroll", () => {
      const atEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 30;
      if (!atEnd && this.followed) this.setFollow(false);
    });
    const form = el("form", {}, this.query);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      again();
    });
    this.query.addEventListener("search", again); // its cross was pressed
    host.append(
      this.pinned,
      el("div", { class: "toolbar" }, el("label", {}, "Attempt", this.attempt), el("label", {}, "Rank", this.rank), form, this.follow, el("span", { class: "grow" }), this.facts),
      this.box,
    );
    this.followed = true;
  }

  async open() {
    clearTimeout(this.timer);
    try {
      this.index = await get(`${this.context.path}/logs/index`);
    } catch (error) {
      this.say(error.message, "bad");
      return;
    }
    this.fillAttempts();
    await this.choose();
  }

  async take(events) {
    if (!events.some((event) => ["started", "failed", "restarted"].includes(event.kind))) return;
    this.index = await get(`${this.context.path}/logs/index`);
    this.fillAttempts();
    this.pin();
  }

  fillAttempts() {
    const attempts = [...new Set(this.index.logs.map((log) => log.attempt))].sort((a, b) => b - a);
    const failed = new Set(this.index.failures.map((failure) => failure.attempt));
    const wanted = Number(this.attempt.value || this.context.chosen.get("attempt") || attempts[0]);
    this.attempt.replaceChildren(...attempts.map((attempt) => el("option", { value: attempt, selected: attempt === wanted, text: failed.has(attempt) ? `${attempt} (failed)` : attempt })));
    this.fillRanks();
  }

  fillRanks() {
    const attempt = Number(this.attempt.value);
    const ranks = this.index.logs.filter((log) => log.attempt === attempt).map((log) => log.rank);
    const failure = this.failure();
    const wanted = Number(this.rank.value || this.context.chosen.get("rank") || failure?.rank || 0);
    this.rank.replaceChildren(...ranks.map((rank) => el("option", { value: rank, selected: rank === wanted, text: rank === failure?.rank ? `${rank} (failed first)` : rank })));
  }

  failure() {
    return this.index.failures.find((failure) => failure.attempt === Number(this.attempt.value)) ?? null;
  }

  /** Show what is chosen, from its end; or what was searched for. */
  async choose(start = null) {
    this.generation++;
    clearTimeout(this.timer);
    this.pin();
    this.list.replaceChildren();
    this.more.hidden = this.older.hidden = true;
    this.searched = this.query.value.trim();
    this.context.choose({ attempt: this.attempt.value, rank: this.rank.value, search: this.searched });
    if (!this.attempt.value) {
      this.say("No worker has written a log yet.");
      this.again();
      return;
    }
    this.log = { attempt: this.attempt.value, rank: this.rank.value };
    if (this.searched) {
      this.next = 0;
      await this.searchOn();
      return;
    }
    await this.run(async (current) => {
      const piece = await this.ask("logs", start === null ? {} : { offset: start });
      if (!current()) return;
      this.first = piece.start;
      this.last = piece.stop;
      this.older.hidden = this.first === 0;
      this.add(piece);
      if (piece.size_bytes === 0) this.say("This worker has printed nothing yet.");
      if (start === null) this.toEnd();
      else this.box.scrollTop = 0;
      this.again();
    });
  }

  ask(what, parameters) {
    return get(`${this.context.path}/${what}`, { ...this.log, ...parameters });
  }

  /** Do something to what is shown; `current` tells whether it still is. */
  async run(something) {
    const mine = this.generation;
    try {
      await something(() => mine === this.generation);
    } catch (error) {
      if (mine === this.generation) this.say(error.message, "bad");
    }
  }

  add(piece) {
    if (piece.lines.length) this.list.querySelector(".empty")?.remove();
    // The last line was without an end yet, and comes again.
    while (this.list.lastChild && Number(this.list.lastChild.dataset.place) >= piece.start && piece.lines.length) this.list.lastChild.remove();
    this.list.append(...piece.lines.map((line) => this.line(line)));
    while (this.list.childElementCount > MOST_LINES) {
      this.list.firstChild.remove();
      this.first = Number(this.list.firstChild.dataset.place);
      this.older.hidden = false;
    }
    this.facts.textContent = bytes(piece.size_bytes);
  }

  line({ place, text }) {
    const shown = el("span", { class: "line" });
    const at = this.searched ? text.toLowerCase().indexOf(this.searched.toLowerCase()) : -1;
    if (at < 0) shown.textContent = text;
    else shown.append(text.slice(0, at), el("mark", { text: text.slice(at, at + this.searched.length) }), text.slice(at + this.searched.length));
    const failed = /^(Traceback \(most recent|\w*(Error|Exception)\b)/.test(text) ? "failed" : null;
    const lead = this.searched
      ? el("button", { class: "plain at", type: "button", title: "Show what is around it", text: number(place), on: { click: () => this.showAround(place) } })
      : null;
    return el("div", { class: failed, "data-place": place }, lead, shown);
  }

  showAround(place) {
    this.query.value = "";
    this.setFollow(false);
    this.choose(place);
  }

  async loadOlder() {
    await this.run(async (current) => {
      const piece = await this.ask("logs", { before: this.first });
      if (!current()) return;
      const height = this.box.scrollHeight;
      this.list.prepend(...piece.lines.map((line) => this.line(line)));
      this.first = piece.start;
      this.older.hidden = this.first === 0;
      this.box.scrollTop += this.box.scrollHeight - height;
    });
  }

  async searchOn() {
    await this.run(async (current) => {
      this.facts.textContent = "searching …";
      const found = await this.ask("logs/search", { text: this.searched, offset: this.next });
      if (!current()) return;
      this.list.append(...found.lines.map((line) => this.line(line)));
      this.next = found.next;
      this.more.hidden = found.next === null;
      this.facts.textContent = `${number(this.list.childElementCount)} lines${found.next === null ? "" : " so far"}`;
      if (!this.list.childElementCount && found.next === null) this.say("Nothing in this log.");
    });
  }

  again() {
    this.timer = setTimeout(() => this.run(async (current) => {
      if (this.host.hidden) return; // until it is opened again
      if (!this.attempt.value) {
        await this.open();
        return;
      }
      const piece = await this.ask("logs", { offset: this.last });
      if (!current()) return;
      if (piece.size_bytes < this.last) this.choose(); // another run of this name
      else {
        if (piece.lines.length) this.add(piece);
        this.last = piece.stop;
        if (this.followed && piece.lines.length) this.toEnd();
        this.again();
      }
    }), FOLLOW_EVERY_MS);
  }

  setFollow(on) {
    this.followed = on;
    this.follow.setAttribute("aria-pressed", String(on));
    if (on) this.toEnd();
  }

  toEnd() {
    if (this.followed) this.box.scrollTop = this.box.scrollHeight;
  }

  pin() {
    const failure = this.failure();
    this.pinned.replaceChildren();
    if (failure === null) return;
    const where = failure.place === null ? null : el("button", { type: "button", text: "Show in its log", on: {
      click: () => {
        this.rank.value = String(failure.rank);
        this.showAround(failure.place);
      },
    } });
    this.pinned.append(
      el("section", { class: "panel pinned" },
        el("header", {}, el("h3", { text: `First failure of attempt ${failure.attempt}` }), el("span", { class: "muted small" }, ago(failure.time)), el("span", { class: "grow" }), where),
        el("div", { class: "inside" }, el("p", { text: failure.summary || failure.error || "failed" }), failure.decision ? el("p", { class: "muted", text: `Then: ${failure.decision}` }) : null)));
  }

  say(text, style = "") {
    this.list.replaceChildren(el("p", { class: `empty ${style}`, text }));
  }
}
