// Keeps what the server has rendered up to date: the page is asked for again, and what differs in #live is changed in
// place, so that the reader's focus, ticks and place in the page stay. There is one rendering of a page, the server's.

const LEAST_MS = 1500; // between two requests
const SHARE = 4; // and at least so many times what one takes, so that a large page leaves the server time for others

let shownAt = 0;
let tookMs = 0;
let waiting = null;
let refreshing = false;

/** Ask for the page again, soon; afterwards: what is to be done once it has changed. */
export function refresh(afterwards = () => {}) {
  if (waiting !== null) return;
  const wait = Math.max(0, shownAt + Math.max(LEAST_MS, SHARE * tookMs) - Date.now());
  waiting = setTimeout(async () => {
    waiting = null;
    if (refreshing || document.hidden) return;
    refreshing = true;
    const beganAt = Date.now();
    try {
      await renew();
      afterwards();
    } finally {
      refreshing = false;
      shownAt = Date.now();
      tookMs = shownAt - beganAt;
    }
  }, wait);
}

/** As refresh, at once. */
export async function renew() {
  const asked = location.href;
  let response;
  try {
    response = await fetch(asked, { headers: { accept: "text/html" } });
  } catch {
    return; // the server is away: the page stays as it was
  }
  if (!response.ok || asked !== location.href) return;
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const now = document.getElementById("live");
  const then = page.getElementById("live");
  if (now && then) become(now, then);
}

/** Change an element into another one of the same kind, where they differ. What has data-keep belongs to scripts. */
function become(now, then) {
  for (const { name } of [...now.attributes]) if (!then.hasAttribute(name)) now.removeAttribute(name);
  for (const { name, value } of then.attributes) if (now.getAttribute(name) !== value) now.setAttribute(name, value);
  if (then.hasAttribute("data-keep")) return;
  if (now.localName === "details") now.open = now.open || then.open;
  if (now.localName === "time" && now.dataset.epoch) return; // the script of all times writes it
  const known = new Map();
  for (const child of now.children) if (child.dataset.key !== undefined) known.set(child.dataset.key, child);
  let place = now.firstChild;
  for (const wanted of [...then.childNodes]) {
    const key = wanted.nodeType === Node.ELEMENT_NODE ? wanted.dataset.key : undefined;
    const same = key !== undefined ? known.get(key) : place;
    if (same && alike(same, wanted)) {
      if (same === place) place = place.nextSibling;
      else now.insertBefore(same, place);
      if (wanted.nodeType === Node.ELEMENT_NODE) become(same, wanted);
      else if (same.data !== wanted.data) same.data = wanted.data;
    } else {
      now.insertBefore(document.importNode(wanted, true), place);
    }
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function alike(one, other) {
  if (one.nodeType !== other.nodeType) return false;
  if (one.nodeType !== Node.ELEMENT_NODE) return true;
  return one.localName === other.localName && one.dataset.key === other.dataset.key && one.id === other.id;
}

const every = Number(document.getElementById("live")?.dataset.every);
if (every) setInterval(() => refresh(), 1000 * every);
document.addEventListener("visibilitychange", () => refresh());
