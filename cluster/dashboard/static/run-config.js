// What a run was told to do: each value with where it came from, what differs from its parent, code and machine.

import { el, get, number } from "./common.js";

const MOST_LINES = 5000; // of a difference of the code

export class Configuration {
  constructor(host, context) {
    this.host = host;
    this.context = context;
    this.loaded = false;
  }

  async open() {
    if (this.loaded) return;
    this.loaded = true; // it is written once
    try {
      this.show(await get(`${this.context.path}/config`));
    } catch (error) {
      this.loaded = false;
      this.host.replaceChildren(el("p", { class: "notice bad", text: error.message }));
    }
  }

  show({ recipe, values, parent, lineage }) {
    const rows = values.map(({ key, value, origin }) => {
      const style = origin === "default" ? "default" : null;
      return el("tr", { class: style, "data-key": key }, el("td", { class: "fit", text: key }), el("td", { class: "wrap", text: value }), el("td", { class: "wrap muted", text: origin }));
    });
    const sift = () => {
      for (const row of rows) {
        const hidden = own.checked && row.classList.contains("default");
        row.hidden = hidden || !row.textContent.toLowerCase().includes(filter.value.toLowerCase());
      }
    };
    const filter = el("input", { type: "search", placeholder: "Filter keys, values, origins", "aria-label": "Filter the configuration", on: { input: sift } });
    const own = el("input", { type: "checkbox", on: { change: sift } });
    this.host.replaceChildren(
      el("div", { class: "toolbar" }, filter, el("label", {}, own, "without defaults"), el("span", { class: "grow" }), recipe ? el("span", { text: `from ${recipe}` }) : null),
      el("div", { class: "panel table config" }, table(["Key", "Value", "Where from"], rows)),
      ...(parent ? this.parent(parent) : []),
      ...lineage.flatMap((launch, i) => this.launch(launch, i === lineage.length - 1)),
    );
  }

  parent({ checkpoint, state, run, differences, problem }) {
    const name = run ? el("a", { href: `/runs/${encodeURIComponent(run)}#config`, text: run }) : el("span", { text: checkpoint });
    const what = el("p", {}, state === "all" ? "Goes on from " : "Starts from the weights of ", name, run ? el("span", { class: "muted", text: ` (${checkpoint})` }) : "");
    const rows = differences.map(({ key, here, there }) =>
      el("tr", {}, el("td", { class: "fit", text: key }), el("td", { class: "wrap", text: there ?? "unset" }), el("td", { class: "wrap", text: here ?? "unset" })));
    const told = rows.length ? el("div", { class: "panel table config" }, table(["Key", "Parent", "This run"], rows))
      : el("p", { class: "muted", text: problem ?? "Nothing else differs." });
    return [el("h2", { text: "Parent" }), what, told];
  }

  launch(launch, open) {
    const { git = {}, host = {} } = launch;
    const facts = {
      Command: [launch.command ?? []].flat().join(" "), Folder: launch.folder, Time: launch.time, User: launch.user,
      Machine: [host.name, host.platform, host.cpus ? `${host.cpus} CPUs` : null].filter(Boolean).join(", "),
      Python: launch.python, Data: launch.data_fingerprint,
      Commit: [git.commit, git.branch ? `on ${git.branch}` : null].filter(Boolean).join(" "), Repository: git.remote ?? git.root,
      "Git said": git.problem,
    };
    const list = el("dl", { class: "facts inside" }, ...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { class: name === "Command" || name === "Commit" ? "mono" : null, text: value })]));
    return [
      el("h2", { text: `Launch of attempt ${launch.attempt}` }),
      el("section", { class: "panel" }, list,
        el("div", { class: "inside" },
          this.fold(`Changes to the code (${number(lines(git.diff).length)} lines)`, git.diff, () => diff(git.diff), open),
          this.fold(`Files that git does not know (${git.untracked?.length})`, git.untracked?.length, () => el("pre", { text: git.untracked.join("\n") })),
          this.fold(`Environment (${Object.keys(launch.environment ?? {}).length})`, launch.environment, () => pairs(launch.environment)),
          this.fold(`Packages (${Object.keys(launch.packages ?? {}).length})`, launch.packages, () => pairs(launch.packages)))),
    ];
  }

  /** Made when it is opened first: a difference may be long. */
  fold(title, content, draw, open = false) {
    if (!content) return null;
    const made = el("details", {}, el("summary", { text: title }));
    made.addEventListener("toggle", () => made.childElementCount === 1 && made.append(draw()));
    made.open = open && lines(content).length < 200;
    return made;
  }
}

function table(names, rows) {
  return el("table", {}, el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col", text: name })))), el("tbody", {}, ...rows));
}

function pairs(values) {
  return el("dl", { class: "facts mono" }, ...Object.entries(values).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]));
}

function lines(text) {
  return typeof text === "string" && text ? text.replace(/\n$/, "").split("\n") : [];
}

function diff(text) {
  const all = lines(text);
  const shown = all.slice(0, MOST_LINES).map((line) => {
    const style = line.startsWith("+") ? "added" : line.startsWith("-") ? "removed" : line.startsWith("@@") ? "faint" : null;
    return el("div", {}, el("span", { class: `line ${style ?? ""}`, text: line }));
  });
  if (all.length > MOST_LINES) shown.push(el("div", { class: "muted", text: `… and ${number(all.length - MOST_LINES)} lines more, in lineage.json` }));
  return el("div", { class: "code lines", tabindex: "0" }, ...shown);
}
