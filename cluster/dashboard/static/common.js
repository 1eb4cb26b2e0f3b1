// What all pages use: elements, numbers and times as people write them, requests, and streams of what is new.

const PLACEHOLDER = "–";

// --- elements

/** An element. attributes: text, class, title, href, ... (on: {event: handler}); what is null is left out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** The text of the page's variable of style, such as "--accent". */
export function styled(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A colour, given as #rrggbb, that covers a share of what is below. */
export function alpha(colour, share) {
  return colour + Math.round(255 * share).toString(16).padStart(2, "0");
}

export function badge(status) {
  return el("span", { class: "badge", "data-status": status, text: status });
}

/** A few numbers as a line. */
export function sparkline(values) {
  const drawing = svg("svg", { class: "sparkline", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" });
  if (values.length > 1) {
    const low = Math.min(...values);
    const range = Math.max(...values) - low || 1;
    const points = values.map((value, i) => `${(100 * i) / (values.length - 1)},${22 - (20 * (value - low)) / range}`);
    drawing.append(svg("polyline", { points: points.join(" ") }));
  }
  return drawing;
}

// --- numbers

const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const FOUR = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 4 });

/** Grouped digits for whole and for large numbers, four significant ones for others. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return PLACEHOLDER;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e15)) return value.toExponential(3);
  return Number.isInteger(value) || size >= 1e4 ? WHOLE.format(value) : FOUR.format(value);
}

/** For axes, in few characters that still tell one tick from the next: 12k, 12.485k, 4.56M. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return PLACEHOLDER;
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / (unit === "k" ? 1e3 : size)).toPrecision(6))}${unit}`;
  }
  return number(value);
}

export function percent(value) {
  return value === null || value === undefined ? PLACEHOLDER : `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`;
}

export function bytes(value) {
  if (value === null || value === undefined) return PLACEHOLDER;
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return `${value} B`;
}

/** A length of time in its two largest units: 3d 4h, 12m 5s. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return PLACEHOLDER;
  if (seconds < 1) return `${Math.round(1000 * seconds)}ms`;
  if (seconds < 10) return `${seconds.toFixed(1)}s`;
  for (const [size, unit, lower, name] of [[86400, "d", 3600, "h"], [3600, "h", 60, "m"], [60, "m", 1, "s"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)}${unit} ${Math.floor((seconds % size) / lower)}${name}`;
  }
  return `${Math.floor(seconds)}s`;
}

// --- times

/** Epoch seconds as the reader's own date and time, with milliseconds. */
export function exact(epoch) {
  const date = new Date(1000 * epoch);
  const two = (value, size = 2) => String(value).padStart(size, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  return `${day} ${time}.${two(date.getMilliseconds(), 3)}`;
}

/** How long ago, as an element that keeps up with the clock and tells the exact time on hover. */
export function ago(epoch) {
  if (epoch === null || epoch === undefined) return el("span", { text: PLACEHOLDER });
  const made = el("time", { datetime: new Date(1000 * epoch).toISOString(), "data-epoch": epoch });
  renew(made);
  return made;
}

function renew(element) {
  const epoch = Number(element.dataset.epoch);
  const past = Date.now() / 1000 - epoch;
  element.textContent = past < 1 ? "now" : past < 60 ? `${Math.floor(past)}s ago` : `${duration(past)} ago`;
  element.title = exact(epoch);
}

function renewAll() {
  for (const element of document.querySelectorAll("time[data-epoch]")) renew(element);
}

renewAll();
setInterval(renewAll, 5000);

// --- requests

/** What the server answers, as JSON. Throws an Error with its explanation. */
export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.append(name, value);
  }
  const text = query.toString();
  return answer(await fetch(text ? `${path}?${text}` : path, { signal }));
}

/** Asks for a change; the answer as JSON. Throws an Error with the server's explanation. */
export async function post(path, body = {}) {
  const token = document.querySelector('meta[name="forgery-token"]');
  const send = () =>
    fetch(path, { method: "POST", headers: { "content-type": "application/json", "x-shardyard-token": token.content }, body: JSON.stringify(body) });
  let response = await send();
  if (response.status === 403) {
    // The server may have been started anew since the page was loaded: its pages have another token then.
    const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
    token.content = page.querySelector('meta[name="forgery-token"]')?.content ?? "";
    response = await send();
  }
  return answer(response);
}

async function answer(response) {
  const text = await response.text();
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    content = { error: text.trim() };
  }
  if (!response.ok) {
    const detail = typeof content.detail === "string" ? content.detail : null;
    throw new Error(content.error || detail || `The server answered ${response.status}.`);
  }
  return content;
}

// --- streams

/**
 * Follows a stream of server-sent events for as long as the page is open; handlers: event's name -> function of what it
 * says. #connection tells how it stands. The browser connects again by itself, and says how far it has come.
 */
export function follow(path, handlers) {
  const source = new EventSource(path);
  source.addEventListener("open", () => connection("live", "live"));
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) connection("lost", "refused: load the page again");
    else connection("lost", "connecting again …");
  });
  source.addEventListener("trouble", (event) => connection("lost", JSON.parse(event.data).error));
  for (const [name, handler] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => {
      connection("live", "live");
      handler(JSON.parse(event.data));
    });
  }
  // A page in the browser's history must not hold one of the few connections to a server.
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => {
    if (event.persisted) location.reload();
  });
  return source;
}

function connection(state, text) {
  const shown = document.getElementById("connection");
  if (shown.dataset.state === state && shown.textContent === text) return;
  shown.dataset.state = state;
  shown.textContent = text;
}
