// Charts of a run's metrics: fetched and drawn when they come into view, kept up to date from the run's stream.
//
// The server gives each bucket of a curve with its smallest and largest value. Both are always drawn, as a band with an
// edge, whatever line is drawn over them: what stands out for one step is seen at any zoom and with any smoothing.

import { alpha, bytes, duration, el, exact, get, number, percent, short, styled } from "./common.js";

const REFETCH_AFTER_MS = 400;
const AT_ONCE = 2; // curves that are asked for together: were it all of them, the first would come with the last
const UPLOT = window.uPlot;

export const AXES = { step: "step", tokens: "tokens", time: "time" };

/** What a metric is a number of, by its name. */
export function writer(metric) {
  if (metric.endsWith("_bytes")) return bytes;
  if (/_s(_max)?$/.test(metric) && !metric.endsWith("per_s")) return seconds;
  if (/(^|\/|_)(mfu|share|hit_rate)$/.test(metric)) return percent;
  return number;
}

/** A length of time with four digits: 503.1 ms. */
export function seconds(value) {
  if (value === null || value === undefined) return number(null);
  const size = Math.abs(value);
  if (size >= 100) return duration(value);
  if (size >= 1 || size === 0) return `${number(value)} s`;
  return size >= 1e-3 ? `${number(1e3 * value)} ms` : `${number(1e6 * value)} µs`;
}

/** The charts of one page, which share an axis, a range, a cursor. */
export class Charts {
  /** view: {x, log, smooth, from, to}; zoomed: called with a range, or nulls, when the reader asks for one. */
  constructor(run, view, zoomed) {
    this.run = run;
    this.view = view;
    this.zoomed = zoomed;
    this.tokensPerStep = null;
    this.extent = null; // of all that has been fetched
    this.all = [];
    this.last = { attempt: 0, step: 0 }; // of the newest row
    this.changed = new Set();
    this.frame = 0;
    this.asking = 0;
    this.waiting = [];
    this.visible = new IntersectionObserver((entries) => this.see(entries), { rootMargin: "200px" });
    this.sizes = new ResizeObserver((entries) => {
      for (const entry of entries) entry.target.chart.resize();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
  }

  /** A chart of a metric, with that of `planned` dashed in it, as an element. */
  add(metric, { title = metric, planned = null } = {}) {
    const chart = new Chart(this, metric, title, planned);
    this.all.push(chart);
    this.visible.observe(chart.element);
    this.sizes.observe(chart.drawing);
    return chart.element;
  }

  /** Ask once it is its turn. */
  async inTurn(ask) {
    if (this.asking === AT_ONCE) await new Promise((go) => this.waiting.push(go));
    else this.asking += 1;
    try {
      return await ask();
    } finally {
      const next = this.waiting.shift();
      if (next) next();
      else this.asking -= 1;
    }
  }

  see(entries) {
    for (const { target, isIntersecting } of entries) {
      target.chart.inView = isIntersecting;
      if (!isIntersecting) continue;
      if (target.chart.stale) target.chart.load();
      else this.redraw(target.chart);
    }
  }

  /** Fetch again what is seen now, and the rest when it is. */
  refresh() {
    for (const chart of this.all) {
      chart.stale = true;
      if (chart.inView) chart.load();
    }
  }

  /** Another axis: nothing that was fetched has a place on it. */
  moveToAxis(x) {
    this.view.x = x;
    this.extent = null;
    for (const chart of this.all) {
      chart.clear();
      chart.curve = null;
    }
    this.refresh();
  }

  redrawAll() {
    for (const chart of this.all) this.redraw(chart);
  }

  rebuild() {
    for (const chart of this.all) chart.clear();
    this.redrawAll();
  }

  place(row) {
    if (this.view.x === "time") return row.time;
    return this.view.x === "tokens" ? row.step * (this.tokensPerStep || 1) : row.step;
  }

  /** Rows as they are recorded. */
  append(rows) {
    for (const row of rows) {
      if (row.attempt > this.last.attempt || row.step < this.last.step) {
        this.last = { attempt: row.attempt, step: row.step };
        this.refetchSoon(); // what is superseded now, and the new attempt's line
      }
      this.last.step = row.step;
      const x = this.place(row);
      for (const chart of this.all) {
        for (const metric of [chart.metric, chart.planned]) {
          if (metric in row.values) chart.append(metric, x, row.values);
        }
      }
    }
  }

  refetchSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), REFETCH_AFTER_MS);
  }

  grow(first, last) {
    if (first === undefined) return;
    const [low, high] = this.extent ?? [first, last];
    if (this.extent && first >= low && last <= high) return;
    this.extent = [Math.min(first, low), Math.max(last, high)];
    this.redrawAll();
  }

  range() {
    const [low, high] = this.extent ?? [0, 1];
    const range = [this.view.from ?? low, this.view.to ?? high];
    return range[1] > range[0] ? range : [range[0] - 0.5, range[0] + 0.5];
  }

  /** Draw at the browser's next frame; one that is out of view is drawn when it comes into it. */
  redraw(chart) {
    this.changed.add(chart);
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      for (const each of this.changed) {
        if (!each.inView) continue;
        this.changed.delete(each);
        each.draw();
      }
    });
  }
}

class Chart {
  constructor(charts, metric, title, planned) {
    this.charts = charts;
    this.metric = metric;
    this.planned = planned;
    this.write = writer(metric);
    this.stale = true;
    this.inView = false;
    this.waiting = []; // rows that came while the curve was fetched
    this.curve = null;
    this.plot = null;
    this.values = el("span", { class: "values" });
    this.toggle = el("button", {
      class: "plain", type: "button", "aria-pressed": "false", "aria-label": `Numbers of ${title}`, text: "table",
      title: "Show the numbers", on: { click: () => this.showNumbers(this.numbers.hidden) },
    });
    this.over = el("div", { class: "over" });
    this.marks = el("div", { class: "marks" });
    this.drawing = el("div", { class: "drawing", tabindex: "0", role: "img", "aria-label": `Curve of ${title}` }, this.marks, this.over);
    this.drawing.addEventListener("keydown", (event) => this.press(event));
    this.drawing.addEventListener("blur", () => this.plot?.setCursor({ left: -10, top: -10 }));
    this.numbers = el("div", { class: "numbers", hidden: true, tabindex: "0" });
    this.element = el("section", { class: "panel chart", "data-metric": metric, "aria-label": title },
      el("header", {}, el("h3", { text: title, title: metric }), this.values, this.toggle), this.drawing, this.numbers);
    this.element.chart = this.drawing.chart = this;
  }

  // --- the curve

  async load() {
    this.stale = false;
    this.request?.abort();
    const request = (this.request = new AbortController());
    const view = this.charts.view;
    this.element.dataset.state = "loading";
    this.buckets = Math.round(Math.min(1000, Math.max(100, this.drawing.clientWidth)));
    const asked = { x: view.x, start: view.from, stop: view.to, buckets: this.buckets };
    const fetched = (metric, smooth) =>
      this.charts.inTurn(() => get(`${this.charts.run}/series`, { metric, smooth, ...asked }, request.signal));
    try {
      const [curve, planned] = await Promise.all([
        fetched(this.metric, view.smooth > 1 ? view.smooth : null),
        this.planned === null ? null : fetched(this.planned, null),
      ]);
      this.take(curve, planned);
      this.element.dataset.state = "shown";
    } catch (error) {
      if (request.signal.aborted) return;
      this.element.dataset.state = "failed";
      this.over.textContent = error.message;
    }
  }

  take(curve, planned) {
    const at = planned === null ? null : new Map(planned.x.map((x, i) => [x, planned.mean[i]]));
    this.curve = {
      x: curve.x, min: curve.min, max: curve.max, mean: curve.mean, count: curve.count, bad: curve.bad,
      // Both lines are in the same buckets, since they are of the same values.
      smooth: curve.smooth === null ? null : curve.smooth.y,
      planned: at === null ? null : curve.x.map((x) => at.get(x) ?? null),
    };
    this.last = curve.last;
    this.superseded = curve.superseded;
    this.restarts = curve.restarts;
    const waiting = this.waiting;
    this.waiting = [];
    for (const each of waiting) this.append(...each);
    const view = this.charts.view;
    if (view.from === null && view.to === null && curve.x.length) {
      this.charts.grow(Math.min(curve.x[0], curve.superseded[0]?.[0] ?? Infinity), Math.max(curve.x.at(-1), curve.superseded.at(-1)?.[0] ?? -Infinity));
    } else if (this.charts.extent === null) this.charts.grow(curve.x[0] ?? 0, curve.x.at(-1) ?? 1);
    this.over.textContent = curve.x.length ? "" : "nothing here";
    this.charts.redraw(this);
  }

  /** One value of those that have just been recorded, null where it is not finite, with its bounds if it has any. */
  append(metric, x, values) {
    if (this.stale && this.curve === null) return; // it comes with the fetch
    if (this.element.dataset.state === "loading") this.waiting.push([metric, x, values]);
    const curve = this.curve;
    if (curve === null) return;
    const last = curve.x.at(-1);
    const value = values[metric];
    if (metric === this.planned) {
      if (x === last) curve.planned[curve.x.length - 1] = value;
      return;
    }
    if (last !== undefined && x < last) return; // it was in what was fetched
    if (this.charts.view.to !== null && x > this.charts.view.to) {
      this.last = value;
      this.charts.redraw(this);
      return;
    }
    if (x === last && curve.count.at(-1) > 1) return; // likewise, as the last of a bucket
    const i = x === last ? curve.x.length - 1 : curve.x.length;
    curve.x[i] = x;
    this.last = value;
    const known = [value, values[`${metric}_min`], values[`${metric}_max`]].filter((each) => Number.isFinite(each));
    curve.min[i] = known.length ? Math.min(...known) : null;
    curve.max[i] = known.length ? Math.max(...known) : null;
    curve.mean[i] = value;
    curve.count[i] = 1;
    curve.bad[i] = values[`${metric}_bad`] ?? (value === null ? 1 : 0);
    if (curve.smooth !== null) curve.smooth[i] = this.smoothAtEnd();
    if (curve.planned !== null) curve.planned[i] ??= null;
    this.over.textContent = "";
    this.charts.grow(x, x);
    this.charts.redraw(this);
    if (curve.x.length > 3 * this.buckets) this.charts.refetchSoon();
  }

  /** The mean of the last values, of which those in buckets are taken for the bucket's mean. */
  smoothAtEnd() {
    const { mean, count } = this.curve;
    let left = this.charts.view.smooth;
    let sum = 0;
    let counted = 0;
    for (let i = mean.length - 1; i >= 0 && left > 0; i--) {
      const taken = Math.min(left, count[i]);
      left -= taken;
      if (mean[i] === null) continue;
      sum += taken * mean[i];
      counted += taken;
    }
    return counted > 0 ? sum / counted : null;
  }

  // --- drawing

  data() {
    const { x, max, min, mean, smooth, planned } = this.curve;
    return [x, max, min, smooth ?? mean, ...(planned === null ? [] : [planned])];
  }

  draw() {
    if (this.curve === null) return;
    if (this.shape !== this.wanted()) this.clear();
    if (this.plot === null) this.build();
    else this.plot.setData(this.data());
    this.tell(this.plot.cursor.idx ?? null);
    if (!this.numbers.hidden) this.fillNumbers();
  }

  /** What a plot cannot change once it is there. */
  wanted() {
    const view = this.charts.view;
    return `${view.x} ${this.isLog()} ${this.curve.smooth !== null}`;
  }

  isLog() {
    return this.charts.view.log && this.curve.max.some((value) => value > 0);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
  }

  resize() {
    if (this.plot !== null && this.drawing.clientWidth) this.plot.setSize(this.size());
  }

  size() {
    const style = getComputedStyle(this.drawing);
    return {
      width: Math.max(120, this.drawing.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)),
      height: this.drawing.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom),
    };
  }

  build() {
    const view = this.charts.view;
    const log = this.isLog();
    this.shape = this.wanted();
    const colour = styled("--curve-1");
    const axis = {
      stroke: styled("--muted"), font: "11px system-ui, sans-serif", ticks: { show: false },
      grid: { stroke: styled("--line"), width: 1 },
    };
    const edge = { stroke: alpha(colour, this.curve.smooth === null ? 0.3 : 0.45), width: 1, points: { show: false } };
    const options = {
      ...this.size(),
      legend: { show: false },
      padding: [14, 18, 0, 0],
      cursor: {
        y: false,
        points: { size: 5 },
        drag: { x: true, y: false, setScale: false },
        sync: { key: "run", filters: { pub: (event) => event === "mousemove" || event === "mouseleave" } },
        bind: { dblclick: () => () => this.charts.zoomed(null, null) },
      },
      scales: {
        x: { time: view.x === "time", range: () => this.charts.range() },
        y: { distr: log ? 3 : 1, range: (_, low, high) => this.heights(low, high, log) },
      },
      axes: [
        { ...axis, size: 24, space: 70, values: (_, ticks, __, ___, step) => ticks.map((tick, i) => (view.x === "time" ? clock(tick, ticks[i - 1], step) : short(tick))) },
        { ...axis, size: 62, space: 28, values: (_, ticks) => ticks.map((value) => (value === null ? "" : this.write(value))) },
      ],
      series: [
        {},
        { label: "largest", ...edge },
        { label: "smallest", ...edge },
        { label: view.smooth > 1 ? "smooth" : "mean", stroke: colour, width: view.smooth > 1 ? 1.75 : 1.25, points: { size: 4, fill: colour } },
        ...(this.planned === null ? [] : [{ label: "planned", stroke: styled("--muted"), width: 1, dash: [4, 3], points: { show: false } }]),
      ],
      bands: [{ series: [1, 2], fill: alpha(colour, 0.16) }],
      hooks: {
        drawAxes: [(plot) => this.drawBehind(plot)],
        draw: [(plot) => this.drawBefore(plot)],
        setCursor: [(plot) => this.tell(plot.cursor.idx ?? null)],
        setSelect: [(plot) => this.select(plot)],
      },
    };
    this.plot = new UPLOT(options, this.data(), this.drawing);
  }

  heights(low, high, log) {
    const [start, stop] = this.charts.range();
    for (const [x, y] of this.superseded) {
      if (x < start || x > stop || y === null) continue;
      low = Math.min(low ?? y, y);
      high = Math.max(high ?? y, y);
    }
    if (low === null || low === undefined) return log ? [0.1, 1] : [0, 1];
    if (!log) {
      if (low === high) return low === 0 ? [0, 1] : [low - 0.1 * Math.abs(low), high + 0.1 * Math.abs(high)];
      const room = 0.06 * (high - low);
      return [low >= 0 && low < 2 * room ? Math.min(0, low) : low - room, high + room];
    }
    const positive = [...this.curve.min, ...this.curve.max].filter((value) => value > 0);
    low = low > 0 ? low : Math.min(...positive);
    const decade = 10 ** Math.floor(Math.log10(low));
    return [Math.floor(low / decade) * decade, Math.max(high, low * 1.01) * 1.15];
  }

  /** The restarts, and what was rolled back. */
  drawBehind(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = styled("--superseded");
    for (const [x, y] of this.superseded) {
      if (y === null) continue;
      ctx.fillRect(plot.valToPos(x, "x", true) - ratio, plot.valToPos(y, "y", true) - ratio, 2 * ratio, 2 * ratio);
    }
    ctx.strokeStyle = styled("--restart");
    ctx.lineWidth = ratio;
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    for (const { x } of this.restarts) {
      const left = plot.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
    this.placeMarks(plot);
  }

  placeMarks(plot) {
    const [start, stop] = this.charts.range();
    const shown = this.restarts.filter(({ x }) => x >= start && x <= stop);
    const placed = JSON.stringify([start, stop, shown, plot.width]);
    if (placed === this.placed) return; // a text that is read now stays
    this.placed = placed;
    this.marks.replaceChildren(
      ...shown.map(({ x, attempt, cause }) => {
        const text = `Attempt ${attempt}${cause ? ` after: ${cause}` : ""}`;
        const mark = el("span", { class: "mark", title: text, role: "img", "aria-label": text });
        mark.style.left = `${plot.over.offsetLeft + plot.valToPos(x, "x")}px`;
        return mark;
      }),
    );
  }

  /** What a line does not show: values without neighbours, and where some are not finite. */
  drawBefore(plot) {
    const { ctx, bbox } = plot;
    const { x, mean, bad } = this.curve;
    const ratio = devicePixelRatio;
    const [start, stop] = this.charts.range();
    ctx.save();
    ctx.fillStyle = styled("--curve-1");
    for (let i = 0; i < x.length; i++) {
      if (x[i] < start || x[i] > stop || mean[i] === null || (mean[i - 1] ?? null) !== null || (mean[i + 1] ?? null) !== null) continue;
      for (const y of new Set([this.curve.min[i], this.curve.max[i]])) {
        ctx.beginPath();
        ctx.arc(plot.valToPos(x[i], "x", true), plot.valToPos(y, "y", true), 2 * ratio, 0, 2 * Math.PI);
        ctx.fill();
      }
    }
    ctx.fillStyle = styled("--bad");
    for (let i = 0; i < x.length; i++) {
      if (!bad[i] || x[i] < start || x[i] > stop) continue;
      const left = plot.valToPos(x[i], "x", true);
      ctx.beginPath();
      ctx.moveTo(left - 4 * ratio, bbox.top - 7 * ratio);
      ctx.lineTo(left + 4 * ratio, bbox.top - 7 * ratio);
      ctx.lineTo(left, bbox.top);
      ctx.fill();
    }
    ctx.restore();
  }

  // --- what the reader does

  select(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    const whole = this.charts.view.x !== "time" && range[1] - range[0] > 4;
    this.charts.zoomed(...(whole ? range.map(Math.round) : range));
  }

  press(event) {
    if (this.plot === null || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const { x } = this.curve;
    const now = this.plot.cursor.idx ?? x.length - 1;
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: x.length - 1 }[event.key];
    const i = Math.min(Math.max(next, 0), x.length - 1);
    this.plot.setCursor({ left: this.plot.valToPos(x[i], "x"), top: 10 }, true, true);
  }

  /** The values at the cursor, or the last ones, in words. */
  tell(at) {
    if (at === null) {
      const finite = this.last !== null || this.curve.x.length === 0;
      const shown = finite ? el("b", { text: this.write(this.last) }) : el("span", { class: "bad", text: "not finite" });
      shown.title = "The newest value";
      this.values.replaceChildren(shown);
      return;
    }
    const curve = this.curve;
    const i = Math.min(at, curve.x.length - 1);
    const parts = [el("b", { text: this.write((curve.smooth ?? curve.mean)[i] ?? null) })];
    if (curve.min[i] !== curve.max[i] || curve.smooth !== null) {
      parts.push(` ${this.write(curve.min[i])} … ${this.write(curve.max[i])}`);
    }
    if (curve.planned !== null) parts.push(` planned ${this.write(curve.planned[i])}`);
    if (curve.bad[i]) parts.push(el("span", { class: "bad", text: ` ${number(curve.bad[i])} not finite` }));
    parts.push(` · ${this.writeX(curve.x[i])}`);
    this.values.replaceChildren(...parts);
  }

  writeX(x) {
    return this.charts.view.x === "time" ? exact(x) : `${AXES[this.charts.view.x]} ${number(x)}`;
  }

  showNumbers(shown) {
    this.numbers.hidden = !shown;
    this.drawing.hidden = shown;
    this.toggle.setAttribute("aria-pressed", String(shown));
    if (shown && this.curve !== null) this.fillNumbers();
    else if (this.curve !== null) {
      this.resize();
      this.charts.redraw(this);
    }
  }

  fillNumbers() {
    const { x, min, mean, max, count, bad, smooth, planned } = this.curve;
    const columns = [
      [AXES[this.charts.view.x], x, (value) => (this.charts.view.x === "time" ? exact(value) : number(value))],
      ["smallest", min, this.write], ["mean", mean, this.write], ["largest", max, this.write],
      ...(smooth === null ? [] : [["smooth", smooth, this.write]]),
      ...(planned === null ? [] : [["planned", planned, this.write]]),
      ["values", count, number], ["not finite", bad, number],
    ];
    const rows = [];
    for (let i = x.length - 1; i >= 0; i--) {
      rows.push(el("tr", {}, ...columns.map(([, values, write]) => el("td", { class: "number", text: write(values[i] ?? null) }))));
    }
    const head = el("tr", {}, ...columns.map(([name]) => el("th", { class: "number", scope: "col", text: name })));
    this.numbers.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }
}

/** A time on an axis: with its day where another one begins. */
function clock(time, before, step) {
  const text = exact(time);
  if (step >= 86400) return text.slice(5, 10);
  const shown = text.slice(11, step >= 60 ? 16 : 19);
  return before !== undefined && exact(before).slice(0, 10) !== text.slice(0, 10) ? `${text.slice(5, 10)} ${shown}` : shown;
}
