// Asks for data, and for nothing that has not changed.

const ROOT = "/dashboard/api";
const known = new Map();

export class Refusal extends Error {
  constructor(status, message, hint) {
    super(message);
    this.status = status;
    this.hint = hint;
  }
}

// Returns {data, changed}.
export async function get(path) {
  const before = known.get(path);
  const headers = before ? { "If-None-Match": before.tag } : {};
  const response = await fetch(ROOT + path, { headers, cache: "no-store" });
  if (response.status === 304) return { data: before.data, changed: false };
  if (!response.ok) throw await refusal(response);
  const data = await response.json();
  known.set(path, { tag: response.headers.get("ETag"), data });
  return { data, changed: true };
}

// Streams one completion: calls `onText` with each piece and returns the last event's figures.
export async function complete(body, signal, onText) {
  const response = await patiently(() =>
    fetch(`${ROOT}/completions`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      cache: "no-store",
      signal,
    }),
  );
  let figures = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Refusal(event.error.code, event.error.message, event.error.hint);
    const text = event.choices[0]?.text;
    if (text) onText(text);
    if (event.usage) figures = { ...event.code2lora, tokens: event.usage.completion_tokens };
  }
  if (figures === null) throw new Refusal(0, "the answer broke off");
  return figures;
}

// A model that loads says when to ask again.
async function patiently(ask) {
  for (let attempt = 0; ; attempt++) {
    const response = await ask();
    if (response.ok) return response;
    const waitS = Number(response.headers.get("Retry-After"));
    if (!waitS || attempt === 5) throw await refusal(response);
    await new Promise((resolve) => setTimeout(resolve, waitS * 1000));
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new Refusal(response.status, error.message, error.hint);
  } catch {
    return new Refusal(response.status, `status ${response.status}`);
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}
