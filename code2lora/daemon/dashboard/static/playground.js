// Asks the base model and the adapter for the same completion, side by side.

import { complete } from "./api.js";
import { byId, clean, count, h, span } from "./dom.js";

export class Playground {
  // generation: the name that an answer bears to the number of the generation, or null
  constructor(generation) {
    this.generation = generation;
    this.choice = byId("with");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
  }

  offer(places, chosen) {
    const options = places.map((place) => h("option", { value: `${place.repository}:${place.worktree}` }, place.label));
    this.choice.replaceChildren(...options);
    const of = places.find((place) => place.worktree === chosen);
    if (of) this.choice.value = `${of.repository}:${of.worktree}`;
  }

  async run() {
    this.running?.abort();
    const running = (this.running = new AbortController());
    const suffix = byId("suffix").value;
    const body = { prompt: byId("prefix").value, max_tokens: Number(byId("max-tokens").value) };
    if (suffix) body.suffix = suffix;
    byId("stop").disabled = false;
    await Promise.all([
      this.fill("base", { ...body, use: "base" }, running.signal),
      this.fill("own", { ...body, repository: this.choice.value, use: "own" }, running.signal),
    ]);
    if (this.running === running) byId("stop").disabled = true;
  }

  async fill(id, body, signal) {
    const text = byId(id).querySelector("pre");
    const told = byId(id).querySelector(".told");
    const given = body.prompt.slice(body.prompt.lastIndexOf("\n") + 1);
    text.replaceChildren(h("span", { class: "given" }, clean(given)));
    told.textContent = "waiting for the model …";
    told.classList.remove("bad");
    try {
      const figures = await complete(body, signal, (piece) => {
        if (signal.aborted) return;
        text.append(clean(piece));
        told.textContent = "…";
      });
      if (!signal.aborted) told.textContent = this.summary(figures);
    } catch (error) {
      if (this.running.signal !== signal) return;
      told.classList.toggle("bad", !signal.aborted);
      told.textContent = signal.aborted ? "stopped" : [error.message, error.hint].filter(Boolean).join(" · ");
    }
  }

  summary({ generation, tokens, first_token_ms, total_ms }) {
    const parts = [generation === null ? "no adapter" : this.generation(generation)];
    parts.push(count(tokens, "token"));
    // the first token waits for the prompt to be read, so it says nothing of the pace
    const afterFirst = (total_ms - first_token_ms) / 1000;
    if (tokens > 1 && afterFirst > 0) parts.push(`${((tokens - 1) / afterFirst).toFixed(0)} tokens/s`);
    if (first_token_ms !== null) parts.push(`first after ${span(first_token_ms)}`);
    return parts.join(" · ");
  }
}
