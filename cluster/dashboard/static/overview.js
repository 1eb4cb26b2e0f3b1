// The overview: live, with curves fetched as rows come into view, filters in the URL, and rows ticked to be compared.

import { follow, get, sparkline } from "./common.js";
import { refresh, renew } from "./live.js";

const FEWEST = 2;
const MOST = 8;
const AT_ONCE = 3; // curves that are asked for together: a first look at a long run takes the server a second
const CURVE_MS = 10_000; // after which a curve that has grown is asked for again

// --- curves

const visible = new Set();
const queue = [];
let asked = 0;

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) visible.add(target);
    else visible.delete(target);
  }
  want();
});

function watch() {
  for (const cell of document.querySelectorAll("[data-sparkline]:not([data-watched])")) {
    cell.setAttribute("data-watched", "");
    watcher.observe(cell);
  }
  want();
}

/** Queue the curves in view that are not what their runs have come to. */
function want() {
  for (const cell of visible) {
    if (!cell.isConnected) visible.delete(cell);
    else if (cell.drawnStep !== cell.dataset.step && !(Date.now() - cell.drawnAt < CURVE_MS) && !queue.includes(cell)) {
      queue.push(cell);
    }
  }
  while (asked < AT_ONCE && queue.length) draw(queue.shift());
}

async function draw(cell) {
  asked += 1;
  cell.drawnStep = cell.dataset.step;
  cell.drawnAt = Date.now();
  try {
    cell.replaceChildren(sparkline(await get(`/api/runs/${encodeURIComponent(cell.dataset.sparkline)}/sparkline`)));
  } catch {
    cell.replaceChildren(); // a run that is gone, or damaged: its row says so
  }
  asked -= 1;
  want();
}

// --- filters

async function show(address) {
  history.replaceState(null, "", address);
  await renew();
  settle();
}

let typed = null;

function filter(form) {
  const query = new URLSearchParams();
  const plain = { sort: "started_at", order: "down" };
  for (const [name, value] of new FormData(form)) {
    if (value && name !== "compare" && value !== plain[name]) query.set(name, value);
  }
  show(query.size ? `/?${query}` : "/");
}

document.addEventListener("input", (event) => {
  const form = event.target.closest("#filter");
  if (!form) return;
  clearTimeout(typed);
  typed = setTimeout(filter, event.target.type === "search" ? 200 : 0, form);
});

document.addEventListener("submit", (event) => {
  if (event.target.id !== "filter") return;
  event.preventDefault();
  filter(event.target);
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("thead a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(link.href);
});

// --- looking ahead: the first time that anybody asks for a run's curves takes the server a moment

const foreseen = new Set();

function foresee(run) {
  if (foreseen.has(run)) return;
  foreseen.add(run);
  get(`/api/runs/${encodeURIComponent(run)}`).catch(() => {}); // whoever goes there is told
}

document.addEventListener("pointerover", (event) => {
  const name = event.target.closest("table.runs tbody th.name");
  if (name) foresee(name.closest("tr").dataset.key);
});

// --- comparing

function ticked() {
  return [...document.querySelectorAll('input[name="compare"]:checked')].map((box) => box.value);
}

function count() {
  const button = document.getElementById("compare");
  if (!button) return;
  const number = ticked().length;
  button.disabled = number < FEWEST || number > MOST;
  button.textContent = number ? `Compare ${number} ticked ${number === 1 ? "run" : "runs"}` : "Compare ticked runs";
  button.title = button.disabled ? `Tick ${FEWEST} to ${MOST} runs.` : "";
}

document.addEventListener("change", (event) => {
  if (event.target.name !== "compare") return;
  count();
  if (event.target.checked) foresee(event.target.value);
});

document.addEventListener("click", (event) => {
  if (event.target.id === "compare") location.href = `/compare?runs=${ticked().map(encodeURIComponent).join(",")}`;
});

function settle() {
  watch();
  count();
}

settle();
follow("/api/stream", { runs: () => refresh(settle) });
