// Keeps the page in step with one worktree: asks every second whether anything has changed.

import { get } from "./api.js";
import { Chart, drawDrift, drawGain, drawLatency, tellDrift, tellGain, tellLatency } from "./charts.js";
import { age, byId, bytes, clean, count, h, short, signed } from "./dom.js";
import { History } from "./history.js";
import { Playground } from "./playground.js";

const POLL_MS = 1000;
const PAGE = 24;
const MOST = 200;
const UNATTENDED_MS = 15 * 60 * 1000;

const state = { places: [], worktree: null, view: null, commits: [], limit: PAGE, attendedMs: Date.now() };

const history = new History((commit) => drift.move(driftIndex(commit), true));
const drift = new Chart(byId("drift"), drawDrift, tellDrift, (item) => history.mark(item?.commit ?? null));
const gain = new Chart(byId("gain"), drawGain, tellGain, (item) => history.mark(item?.commit ?? null));
const latency = new Chart(byId("latency"), drawLatency, tellLatency, (item) => history.mark(item?.commit ?? null));
const playground = new Playground(nameGeneration);

function driftIndex(commit) {
  const at = drift.items.findIndex((item) => item.commit === commit);
  return at < 0 ? null : at;
}

function nameGeneration(name) {
  const refresh = state.view?.refreshes.find((each) => each.name === name);
  return refresh ? `generation ${refresh.generation}` : `adapter ${clean(name)}`;
}

// ---- what is asked for ------------------------------------------------------------------------

async function look() {
  const listed = await get("/places");
  if (listed.changed) showPlaces(listed.data.places);
  if (state.worktree === null) return showNothing();
  const worktree = state.worktree;
  const { data, changed } = await get(`/places/${worktree}`);
  if (worktree !== state.worktree) return;
  if (changed || state.view !== data) {
    state.view = data;
    await loadCommits(worktree);
    showView(data);
  }
  showAges();
}

async function loadCommits(worktree) {
  let page;
  try {
    page = (await get(`/places/${worktree}/commits?limit=${Math.min(state.limit, MOST)}`)).data;
  } catch (error) {
    if (error.status !== 400) throw error; // git cannot be read, which the view says too
    page = { commits: [], n_lanes: 0, following: null };
  }
  if (worktree !== state.worktree) return;
  Object.assign(state, { commits: page.commits, nLanes: page.n_lanes, following: page.following });
  showCommits();
}

async function older() {
  const worktree = state.worktree;
  const page = (await get(`/places/${worktree}/commits?before=${state.following}&limit=${PAGE}`)).data;
  if (worktree !== state.worktree) return;
  const known = new Set(state.commits.map((commit) => commit.commit));
  state.commits = [...state.commits, ...page.commits.filter((commit) => !known.has(commit.commit))];
  Object.assign(state, { nLanes: Math.max(state.nLanes, page.n_lanes), following: page.following });
  state.limit = state.commits.length;
  showCommits();
}

async function poll() {
  const isUnattended = Date.now() - state.attendedMs > UNATTENDED_MS;
  if (!document.hidden && !isUnattended) {
    try {
      await look();
      tell("up to date");
    } catch (error) {
      tell(error.status === 401 ? "logged out: run `code2lora dashboard` again" : `no answer: ${error.message}`, true);
    }
  } else if (isUnattended) {
    tell("paused, so that the model may rest; move the pointer to go on");
  }
  setTimeout(poll, POLL_MS);
}

// ---- what is shown ----------------------------------------------------------------------------

function tell(words, isBad = false) {
  const status = byId("connection");
  if (status.textContent !== words) status.textContent = words;
  status.classList.toggle("bad", isBad);
}

function showPlaces(places) {
  const names = places.map((place) => place.name);
  state.places = places.map((place) => {
    const isOnly = names.filter((name) => name === place.name).length === 1;
    return { ...place, label: clean(isOnly ? place.name : `${place.name} — ${place.path}`) };
  });
  byId("place").replaceChildren(...state.places.map((place) => h("option", { value: place.worktree }, place.label)));
  const wanted = [state.worktree, asked(), state.places[0]?.worktree].find((number) =>
    state.places.some((place) => place.worktree === number),
  );
  choose(wanted ?? null);
}

// The address names the place in its query: links to the page's sections replace the fragment.
function asked() {
  return Number(new URLSearchParams(location.search).get("place"));
}

function choose(worktree) {
  if (state.worktree !== worktree) Object.assign(state, { view: null, limit: PAGE });
  state.worktree = worktree;
  if (worktree !== null) byId("place").value = String(worktree);
  playground.offer(state.places, worktree);
}

function showNothing() {
  byId("headline").textContent = "No repository is registered.";
  byId("subline").textContent = "Run `code2lora init` in one.";
}

function showCommits() {
  history.show(state.commits, state.nLanes);
  byId("older").hidden = state.following === null;
  const inLine = state.commits.filter((commit) => commit.lane === 0).reverse();
  const main = inLine.map((commit) => ({ ...commit, summary: clean(commit.summary) }));
  drift.show(main, "No commit yet.");
  gain.show(main.filter((commit) => commit.gain_over_base !== null), "No commit is scored yet.");
}

function showView(view) {
  document.title = `${clean(view.name)} · code2lora`;
  showLead(view);
  byId("facts").replaceChildren(...facts(view).map(fact));
  byId("problem").hidden = view.problem === null;
  byId("problem").textContent = view.problem === null ? "" : clean(view.problem);
  latency.show(view.refreshes, "No adapter has been published yet.");
  byId("about-model").replaceChildren(...aboutModel(view).flatMap(([label, ...value]) => [h("dt", {}, label), h("dd", {}, ...value)]));
  showFailures(view.failures);
}

function showLead({ head, adapter, branch, path }) {
  const title = byId("headline");
  const hash = (commit) => h("span", { class: "hash" }, short(commit));
  if (adapter === null) {
    title.replaceChildren(head === null ? "No commit yet: the first one makes the adapter." : "No adapter yet.");
  } else if (adapter.is_current) {
    title.replaceChildren(`Generation ${adapter.generation} serves HEAD, `, hash(adapter.commit));
  } else {
    title.replaceChildren(`Generation ${adapter.generation} serves `, hash(adapter.commit), head ? ", HEAD is " : "", head ? hash(head.commit) : "");
  }
  const words = [head?.branch ?? (head ? "detached" : branch), head?.summary, path];
  byId("subline").textContent = words.filter(Boolean).map(clean).join(" · ");
}

function facts(view) {
  const { adapter, state: at, backfill, model, standing } = view;
  const behind = at === null ? "–" : at.behind === 0 ? "none" : count(at.behind, "commit");
  return [
    ["State", at === null ? "none yet" : `step ${at.step}`, at && `${at.provisional ? "provisional, " : ""}since ${at.anchor_role} anchor ${short(at.anchor)}`],
    ["Waiting", behind, backfill && `history replayed: ${backfill.done} of ${backfill.total}`],
    ["Published", adapter ? h("time", { datetime: adapter.published_at }) : "–", adapter && bytes(adapter.n_bytes)],
    ["Stored", count(view.n_states, "state"), `${count(view.n_adapters, "adapter")}, ${bytes(view.adapter_bytes)}`],
    ["Gain", running(standing), standing?.gain ? `${meant(standing.gain.over_generic)} over generic, ${count(standing.gain.n_commits, "commit")}` : "no commit is scored yet"],
    ["Serves", adapter ? { own: "own adapter", generic: "generic adapter", base: "base model" }[adapter.use] : "–", standing && clean(standing.why.slice(standing.why.indexOf(": ") + 2))],
    ["Audit", verdict(model), model && `of ${clean(model.name)}`],
  ];
}

const meant = ({ mean, error }) => `${signed(mean)}${error === null ? "" : ` ±${error.toFixed(3)}`}`;

const running = (standing) => (standing?.gain ? `${meant(standing.gain.over_base)} over base` : "not measured yet");

const verdict = (model) => (model === null ? "model not found" : (model.verdict ?? "not audited"));

function fact([label, value, note]) {
  return h("div", {}, h("dt", {}, label), h("dd", {}, value, note ? h("small", {}, note) : null));
}

function aboutModel({ model }) {
  if (model === null) return [["Model", "its files cannot be read"]];
  const rows = [
    ["Model", clean(model.name), " ", h("small", {}, `for ${clean(model.base)}`)],
    ["Checkpoint", h("span", { class: "mono" }, model.checkpoint.slice(0, 16) || "–")],
    ["Gain over base", gainOf(model.gain_over_base), " ", h("small", {}, heldOut(model, model.gain_over_base))],
    ["Gain over generic", gainOf(model.gain_over_generic), " ", h("small", {}, heldOut(model, model.gain_over_generic))],
    ["Audit", verdict(model), model.verdict === null ? "" : ` on ${count(model.n_audited, "held-out repository").replace("repositorys", "repositories")}`],
  ];
  for (const { name, passed, mean, low, high } of model.tests) {
    const word = passed === null ? "not measured" : passed ? "passed" : "failed";
    const figures = mean === null ? "" : ` ${signed(mean, 4)} (${signed(low ?? mean, 4)} to ${signed(high ?? mean, 4)})`;
    rows.push([clean(name).replaceAll("_", " "), word, h("small", {}, figures)]);
  }
  return rows;
}

const gainOf = (value) => (value === null ? "not measured" : signed(value));

const heldOut = (model, value) =>
  value === null ? "" : `nats a token${model.n_measured ? `, ${model.n_measured} held-out repositories` : ""}`;

function showFailures(failures) {
  byId("n-failures").textContent = failures.length ? String(failures.length) : "";
  const shown = failures.map((failure) =>
    h(
      "div",
      { class: "failure" },
      clean(failure.message),
      h(
        "small",
        {},
        `${clean(failure.stage)}, `,
        h("time", { datetime: failure.at }),
        failure.n_times > 1 ? `, ${failure.n_times} times` : "",
        failure.hint ? ` · ${clean(failure.hint)}` : "",
      ),
    ),
  );
  byId("failure-list").replaceChildren(...(shown.length ? shown : [h("p", { class: "empty" }, "None open.")]));
}

function showAges() {
  for (const time of document.querySelectorAll("time")) {
    const words = age(time.dateTime);
    const text = words === "now" ? "just now" : `${words} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}

// ---- what people do ---------------------------------------------------------------------------

byId("place").addEventListener("change", (event) => {
  choose(Number(event.target.value));
  globalThis.history.replaceState(null, "", `?place=${state.worktree}`);
  look().catch((error) => tell(error.message, true));
});
addEventListener("popstate", () => {
  const worktree = asked();
  if (worktree === state.worktree || !state.places.some((place) => place.worktree === worktree)) return;
  choose(worktree);
  look().catch((error) => tell(error.message, true));
});
byId("older").addEventListener("click", () => older().catch((error) => tell(error.message, true)));
for (const kind of ["pointermove", "keydown", "visibilitychange"]) {
  document.addEventListener(kind, () => (state.attendedMs = Date.now()), { passive: true });
}

poll();
