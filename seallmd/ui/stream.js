// Server-sent events over fetch: EventSource can send neither a key nor a body. Owns the key, too.

let key = "";

export const setKey = (value) => { key = value.trim(); };

/** fetch from this server, with the key if there is one. */
export function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
}

/** What is wrong, in the server's words. */
export async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** The documents of a stream of events, one after the other; ends with it, or at [DONE]. */
export async function* documents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") return;
        if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
