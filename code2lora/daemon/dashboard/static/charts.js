// Draws the charts: drift and gain along the commits, and what each refresh took.

import { figure, short, signed, span, svg } from "./dom.js";

const TOP = 12;
const BOTTOM = 34;
const LEFT = 44;
const RIGHT = 8;

// A chart that redraws itself when its width changes, with a cursor for pointer and arrow keys.
export class Chart {
  constructor(root, draw, tell, moved = () => {}) {
    this.plot = root.querySelector(".plot");
    this.readout = root.querySelector(".readout");
    Object.assign(this, { draw, tell, moved, items: [], at: null });
    new ResizeObserver(() => this.render()).observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  show(items, empty) {
    Object.assign(this, { items, empty, at: null });
    this.render();
  }

  // Puts the cursor on an item; null takes it away.
  move(at, quietly = false) {
    if (at === this.at) return;
    this.at = at;
    this.render();
    if (!quietly) this.moved(at === null ? null : this.items[at]);
  }

  render() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!width) return;
    const area = { left: LEFT, right: width - RIGHT, top: TOP, bottom: height - BOTTOM };
    const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    if (this.items.length) {
      this.places = this.draw(chart, area, this.items, this.at);
    } else {
      chart.append(svg("text", { x: 0, y: area.top + 18 }, this.empty ?? ""));
    }
    this.plot.replaceChildren(chart);
    this.readout.textContent = this.items.length ? this.tell(this.items, this.at) : "";
  }

  point(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    if (!this.items.length || !this.places) return;
    const distances = this.places.map((place) => Math.abs(place - x));
    this.move(distances.indexOf(Math.min(...distances)));
  }

  key(event) {
    const last = this.items.length - 1;
    const at = this.at ?? last + 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, Escape: null }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.move(to === null ? null : Math.max(0, Math.min(last, to)));
  }
}

// Commits, oldest first: a line through the steps, hollow dots for provisional states, ticks where
// a later commit carries the change, and below the axis a mark for each generation.
export function drawDrift(chart, area, commits, at) {
  const step = (area.right - area.left) / commits.length;
  const places = commits.map((_, n) => area.left + step * (n + 0.5));
  const top = niceTop(Math.max(...commits.map((commit) => commit.drift ?? 0)) || 0.01);
  const y = (drift) => area.bottom - ((area.bottom - area.top) * drift) / top;
  scale(chart, area, top, (value) => value.toFixed(top < 0.02 ? 4 : top < 0.2 ? 3 : 2));
  if (at !== null) cursor(chart, area, places[at]);
  const line = [];
  commits.forEach((commit, n) => {
    if (commit.drift !== null && commit.mark !== "provisional") line.push(`${places[n]},${y(commit.drift)}`);
  });
  if (line.length > 1) {
    const [first, last] = [line[0], line.at(-1)].map((point) => point.split(",")[0]);
    chart.append(svg("path", { class: "area", d: `M${first},${area.bottom}L${line.join("L")}L${last},${area.bottom}Z` }));
    chart.append(svg("polyline", { class: "line", points: line.join(" ") }));
  }
  const r = Math.max(1.6, Math.min(3, step / 4));
  commits.forEach((commit, n) => {
    const x = places[n];
    if (commit.drift === null) {
      chart.append(svg("line", { class: "tick", x1: x, x2: x, y1: area.bottom - 3, y2: area.bottom + 3 }));
    } else {
      const provisional = commit.mark === "provisional" ? " provisional" : "";
      chart.append(svg("circle", { class: `dot${provisional}`, cx: x, cy: y(commit.drift), r: n === at ? r + 1.5 : r }));
    }
  });
  generations(chart, area, commits, places);
  return places;
}

function generations(chart, area, commits, places) {
  let free = -Infinity;
  const marked = commits.map((commit, n) => ({ ...commit, x: places[n] })).filter((commit) => commit.generation !== null);
  const live = marked.find((commit) => commit.is_live);
  for (const { x, generation, is_live } of marked) {
    const y = area.bottom + 8;
    const mark = `generation${is_live ? " live" : ""}`;
    chart.append(svg("path", { class: mark, d: `M${x},${y}l3.5,6h-7z` }));
    const crowded = x < free || (live && !is_live && Math.abs(live.x - x) < 26);
    if (!crowded) {
      chart.append(svg("text", { class: is_live ? "live" : null, x, y: y + 20, "text-anchor": "middle" }, String(generation)));
      free = x + 26;
    }
  }
}

export function tellDrift(commits, at) {
  if (at === null) {
    const steps = commits.filter((commit) => commit.drift !== null).length;
    return `${commits.length} commits, ${steps} with drift; ▲ adapter generations`;
  }
  const { commit, drift, generation, mark, summary } = commits[at];
  const parts = [short(commit), drift === null ? mark : `drift ${figure(drift, 4)}`];
  if (drift !== null && mark) parts.push(mark);
  if (generation !== null) parts.push(`generation ${generation}`);
  return `${parts.filter(Boolean).join(" · ")} · ${summary}`;
}

// Scored commits, oldest first: what the own adapter saved over base and over generic, about zero.
export function drawGain(chart, area, commits, at) {
  const step = (area.right - area.left) / commits.length;
  const places = commits.map((_, n) => area.left + step * (n + 0.5));
  const gains = commits.flatMap((commit) => [commit.gain_over_base, commit.gain_over_generic]);
  const top = niceTop(Math.max(...gains, 0.001));
  const bottom = Math.min(...gains) < 0 ? -niceTop(-Math.min(...gains)) : 0;
  const y = (gain) => area.bottom - ((area.bottom - area.top) * (gain - bottom)) / (top - bottom);
  const digits = top - bottom < 0.02 ? 4 : top - bottom < 0.2 ? 3 : 2;
  for (const value of new Set([bottom, 0, top])) {
    chart.append(svg("line", { class: value ? "rule" : "axis", x1: area.left, x2: area.right, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { x: area.left - 6, y: y(value) + 4, "text-anchor": "end" }, value ? signed(value, digits) : "0"));
  }
  if (at !== null) cursor(chart, area, places[at]);
  const r = Math.max(1.6, Math.min(3, step / 4));
  commits.forEach((commit, n) => {
    const base = y(commit.gain_over_base);
    chart.append(svg("line", { class: "stem", x1: places[n], x2: places[n], y1: y(0), y2: base }));
    const size = n === at ? r + 1.5 : r;
    chart.append(svg("circle", { class: "dot", cx: places[n], cy: base, r: size }));
    chart.append(svg("circle", { class: "dot generic", cx: places[n], cy: y(commit.gain_over_generic), r: size }));
  });
  return places;
}

export function tellGain(commits, at) {
  if (at === null) {
    const n = commits.reduce((sum, commit) => sum + commit.n_scored_tokens, 0);
    const mean = (key) => commits.reduce((sum, commit) => sum + commit[key] * commit.n_scored_tokens, 0) / n;
    return `${signed(mean("gain_over_base"))} over base, ${signed(mean("gain_over_generic"))} over generic, on ${figure(n)} tokens shown`;
  }
  const { commit, gain_over_base: base, gain_over_generic: generic, n_scored_tokens: n, summary } = commits[at];
  return `${short(commit)} · ${signed(base)} over base · ${signed(generic)} over generic · ${figure(n)} tokens · ${summary}`;
}

const PARTS = ["embed", "advance", "publish"];

// Refreshes, oldest first, as stacked bars; one far above the rest is cut, and says what it took.
export function drawLatency(chart, area, refreshes, at) {
  const totals = refreshes.map(total);
  const typical = [...totals].sort((a, b) => a - b)[Math.floor(totals.length * 0.8)];
  const top = niceTop(Math.min(Math.max(...totals), typical * 2.5) || 1);
  const step = (area.right - area.left) / Math.max(refreshes.length, 12);
  const wide = Math.max(2, Math.min(18, step * 0.68));
  const places = refreshes.map((_, n) => area.left + step * (n + 0.5));
  scale(chart, area, top, span);
  refreshes.forEach((refresh, n) => {
    const bar = svg("g", { class: `bar${at !== null && at !== n ? " dim" : ""}` });
    let below = 0;
    for (const part of PARTS) {
      const from = Math.min(below, top);
      below += refresh[`${part}_ms`] ?? 0;
      const height = ((area.bottom - area.top) * (Math.min(below, top) - from)) / top;
      const y = area.bottom - ((area.bottom - area.top) * Math.min(below, top)) / top;
      if (height > 0) bar.append(svg("rect", { class: part, x: places[n] - wide / 2, y, width: wide, height }));
    }
    if (below > top) {
      const labelled = places.slice(0, n).every((x, m) => totals[m] <= top || places[n] - x > 54);
      if (labelled) bar.append(svg("text", { x: Math.max(places[n] - wide / 2, area.left), y: area.top - 3 }, `↑ ${span(below)}`));
    }
    chart.append(bar);
    const sparse = Math.ceil(30 / step);
    const isLast = n === refreshes.length - 1;
    if (isLast || (n % sparse === 0 && refreshes.length - 1 - n >= sparse)) {
      chart.append(svg("text", { x: places[n], y: area.bottom + 16, "text-anchor": "middle" }, String(refresh.generation)));
    }
  });
  return places;
}

export function tellLatency(refreshes, at) {
  if (at === null) {
    const sorted = refreshes.map(total).sort((a, b) => a - b);
    return `median ${span(sorted[Math.floor(sorted.length / 2)])} of ${refreshes.length}, by generation`;
  }
  const refresh = refreshes[at];
  const parts = PARTS.map((part) => `${part} ${span(refresh[`${part}_ms`])}`);
  return `generation ${refresh.generation} · ${short(refresh.commit)} · ${parts.join(" · ")}`;
}

const total = (refresh) => PARTS.reduce((sum, part) => sum + (refresh[`${part}_ms`] ?? 0), 0);

function cursor(chart, area, x) {
  chart.append(svg("line", { class: "cursor", x1: x, x2: x, y1: area.top, y2: area.bottom }));
}

function scale(chart, area, top, format) {
  for (const part of [0, 0.5, 1]) {
    const y = area.bottom - (area.bottom - area.top) * part;
    chart.append(svg("line", { class: part ? "rule" : "axis", x1: area.left, x2: area.right, y1: y, y2: y }));
    chart.append(svg("text", { x: area.left - 6, y: y + 4, "text-anchor": "end" }, part ? format(top * part) : "0"));
  }
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((n) => n * power >= value * 1.02) * power;
}
