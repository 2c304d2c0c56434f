// The server as the page asks it: JSON and forms, streams, the key, and a second try where there are too many requests.
// Knows the OpenAI API and ours beside it; does not depend on the page.

const KEY = "unigen.key";
const LONGEST_WAIT = 60; // seconds that a request is put off for

/** What the server refused: its message in one line, and the name of what is wrong where it says so. */
export class Refused extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.name = "Refused";
    this.status = status;
    this.param = param;
  }
}

/** The key that goes with every request from here on, in this tab. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** An answer of status 200; a body that is no form goes as JSON. Raises Refused. notice is told why it takes longer. */
export async function ask(path, body, { signal, notice = () => {} } = {}) {
  let answer = await sent(path, body, signal);
  if (answer.status === 429) {
    const given = Number(answer.headers.get("retry-after"));
    const seconds = Math.min(LONGEST_WAIT, given > 0 ? given : 1);
    notice(`The server is busy: asking again in ${seconds} s.`);
    await pause(seconds, signal);
    notice("");
    answer = await sent(path, body, signal);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) document.dispatchEvent(new CustomEvent("unigen:key"));
  throw refusal(await answer.json().catch(() => null), answer.status);
}

/** A chat's answer as it comes: { settings }, { text } and { image } in order, at last { reason }. Raises Refused. A text
 * after a picture comes without the empty line that parts it from the text before. */
export async function* parts(body, options) {
  let drawn = false;
  for await (const chunk of chunks("v1/chat/completions", { ...body, stream: true }, options)) {
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (choice.settings) yield { settings: choice.settings };
    if (choice.delta.content) yield { text: drawn ? choice.delta.content.trimStart() : choice.delta.content };
    drawn = choice.delta.content ? false : drawn;
    for (const image of choice.delta.images ?? []) {
      drawn = true;
      yield { image: image.image_url.url };
    }
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
}

/** Pictures as they are made: { index, url, settings }, without settings as long as it is not finished. body: with what
 * asks for a stream. Raises Refused. */
export async function* pictures(path, body, options) {
  for await (const { index, b64_json, settings } of chunks(path, body, options)) {
    yield { index, url: `data:image/png;base64,${b64_json}`, settings };
  }
}

/** The events of a stream. Raises Refused, also where it breaks off. */
async function* chunks(path, body, options) {
  const answer = await ask(path, body, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Refused("the connection to the server was lost");
      });
      if (done) throw new Refused("the server ended the answer before it was complete");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const line = event.split("\n").find((one) => one.startsWith("data: "));
        if (!line) continue;
        const data = line.slice("data: ".length);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw refusal(chunk);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Resolves after so many seconds, or raises AbortError when the signal says so. */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

async function sent(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body && !(body instanceof FormData)) headers["content-type"] = "application/json";
  const data = body && !(body instanceof FormData) ? JSON.stringify(body) : body;
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: data, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached");
  }
}

function refusal(body, status) {
  const error = body?.error;
  return new Refused(error?.message ?? `the server answered with ${status}`, { status, param: error?.param });
}
