// Draws the commits as rows, and beside them the graph that they form.

import { age, byId, clean, figure, h, short, signed, span, svg } from "./dom.js";

const LANE = 14;
const BADGES = { "between steps": "between", "no state": "none", anchor: "anchor", provisional: "provisional" };

export class History {
  constructor(pointed) {
    this.body = byId("rows");
    this.frame = this.body.closest(".history");
    this.table = this.body.closest("table");
    this.pointed = pointed;
    this.commits = [];
    new ResizeObserver(() => this.drawGraph()).observe(this.frame);
    this.body.addEventListener("pointerover", (event) => {
      const row = event.target.closest("tr");
      if (row) this.pointed(row.dataset.commit);
    });
    this.body.addEventListener("pointerleave", () => this.pointed(null));
  }

  show(commits, nLanes) {
    Object.assign(this, { commits, nLanes });
    this.table.querySelector("th.graph").style.width = `${nLanes * LANE + 12}px`;
    this.body.replaceChildren(...commits.map(row));
    if (!commits.length) {
      const words = "No commit yet: the first one makes the adapter.";
      this.body.append(h("tr", {}, h("td", { colspan: 10, class: "empty" }, words)));
    }
    this.drawGraph();
  }

  mark(commit) {
    for (const each of this.body.rows) each.classList.toggle("at", each.dataset.commit === commit);
  }

  drawGraph() {
    this.frame.querySelector("svg")?.remove();
    if (!this.commits.length) return;
    const top = this.frame.getBoundingClientRect().top;
    const middle = [...this.body.rows].map((each) => {
      const box = each.getBoundingClientRect();
      return box.top - top + box.height / 2;
    });
    const height = this.frame.getBoundingClientRect().height;
    const graph = svg("svg", { width: this.nLanes * LANE + 8, height, "aria-hidden": "true" });
    const at = new Map(this.commits.map((commit, n) => [commit.commit, n]));
    this.commits.forEach((commit, n) => graph.append(...edge(commit, n, at, middle, this.commits, height)));
    this.commits.forEach((commit, n) => graph.append(...node(commit, middle[n])));
    this.frame.append(graph);
  }
}

const x = (lane) => lane * LANE + 9;
const colour = (lane) => `var(--lane-${lane + 1})`;

function edge(commit, n, at, middle, commits, height) {
  if (commit.parent === null) return [];
  const to = at.get(commit.parent);
  const from = x(commit.lane);
  let path = `M${from},${middle[n]}`;
  if (to === undefined) {
    path += `V${height}`;
  } else if (commits[to].lane === commit.lane) {
    path += `V${middle[to]}`;
  } else {
    const end = x(commits[to].lane);
    path += `V${middle[to] - 24}C${from},${middle[to] - 8} ${end},${middle[to] - 16} ${end},${middle[to]}`;
  }
  return [styled(svg("path", { class: "edge", d: path }), { stroke: colour(commit.lane) })];
}

function node(commit, y) {
  const place = { cx: x(commit.lane), cy: y };
  const stroke = { stroke: colour(commit.lane), fill: colour(commit.lane) };
  const nodes = [];
  if (commit.is_live) nodes.push(styled(svg("circle", { ...place, class: "ring", r: 7 }), { stroke: stroke.stroke }));
  if (commit.mark === "provisional" || commit.mark === "no state") {
    nodes.push(styled(svg("circle", { ...place, class: "node hollow", r: 3.5 }), { stroke: stroke.stroke }));
  } else if (commit.mark === "between steps") {
    nodes.push(styled(svg("circle", { ...place, class: "node small", r: 1.8 }), stroke));
  } else if (commit.mark === "anchor") {
    nodes.push(styled(svg("rect", { class: "node", x: place.cx - 4, y: y - 4, width: 8, height: 8 }), stroke));
  } else {
    nodes.push(styled(svg("circle", { ...place, class: "node", r: 4 }), stroke));
  }
  return nodes;
}

// By the object model, since the policy of this page forbids style attributes.
function styled(element, values) {
  Object.assign(element.style, values);
  return element;
}

function row(commit) {
  const classes = [commit.is_live && "live", commit.step === null && "without"].filter(Boolean).join(" ");
  const element = h(
    "tr",
    { class: classes || null },
    h("td", {}),
    h("td", { class: "hash", title: commit.commit }, short(commit.commit)),
    h("td", { title: clean(commit.summary) }, ...badges(commit), clean(commit.summary)),
    h("td", { class: "number wide" }, figure(commit.step)),
    h("td", { class: "number" }, figure(commit.drift, 4)),
    h("td", { class: "number wide" }, figure(commit.n_tokens)),
    h("td", { class: "number wide" }, span(commit.embed_ms)),
    h("td", { class: "number" }, figure(commit.generation)),
    h("td", { class: "number wide", title: gainInWords(commit) }, commit.gain_over_base === null ? "–" : signed(commit.gain_over_base)),
    h("td", { class: "number wide", title: commit.committed_at }, age(commit.committed_at)),
  );
  element.dataset.commit = commit.commit;
  return element;
}

function gainInWords(commit) {
  if (commit.n_scored_tokens === null) return "not scored";
  if (commit.gain_over_base === null) return "no added line that counts";
  const { gain_over_base: base, gain_over_generic: generic, n_scored_tokens: n } = commit;
  return `${signed(base)} over base, ${signed(generic)} over generic, ${figure(n)} tokens`;
}

function badges(commit) {
  const words = [];
  if (commit.is_live) words.push(["live", "live"]);
  for (const head of commit.heads) words.push(["head", clean(head)]);
  if (commit.mark) words.push([BADGES[commit.mark], commit.mark]);
  return words.map(([kind, word]) => h("span", { class: `badge ${kind}` }, word));
}
