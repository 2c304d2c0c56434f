// Requests to the server: JSON and forms, streams, the API key, and one retry where there are too many requests.
// Does not depend on: the page.

const KEY_ITEM = "unigen.key"; // in the session storage of the tab
const MAX_RETRY_SECONDS = 60;

/** An error response of the server: its message in one line, and the field that is wrong, where it names one. */
export class RequestError extends Error {
  /**
   * @param {string} message
   * @param {{ status?: number, param?: string | null }} details HTTP status, and the name of the wrong field
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.name = "RequestError";
    this.status = status;
    this.param = param;
  }
}

/**
 * Send this API key with every further request of this tab.
 * @param {string} key
 */
export function setApiKey(key) {
  sessionStorage.setItem(KEY_ITEM, key);
}

/**
 * Send a request; a busy server is asked once again after the time that it says.
 * @param {string} path
 * @param {object | FormData} [body] posted as JSON, or as a form
 * @param {{ signal?: AbortSignal, notify?: (text: string) => void }} [options] notify is told why it takes longer
 * @returns {Promise<Response>} with status 200
 * @throws {RequestError}
 */
export async function request(path, body, { signal, notify = () => {} } = {}) {
  let response = await send(path, body, signal);
  if (response.status === 429) {
    const retryAfter = Number(response.headers.get("retry-after"));
    const seconds = Math.min(MAX_RETRY_SECONDS, retryAfter > 0 ? retryAfter : 1);
    notify(`The server is busy: asking again in ${seconds} s.`);
    await pause(seconds, signal);
    notify("");
    response = await send(path, body, signal);
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("unigen:key"));
  throw toRequestError(await response.json().catch(() => null), response.status);
}

/**
 * Stream a chat completion. A text after an image comes without the blank line that separates it from the text before.
 * @param {object} body of /v1/chat/completions
 * @param {object} [options] as of `request`
 * @yields {{ settings: object } | { text: string } | { image: string } | { reason: string }} parts in order; the reason
 *   why it finished comes last
 * @throws {RequestError}
 */
export async function* streamParts(body, options) {
  let afterImage = false;
  for await (const chunk of streamChunks("v1/chat/completions", { ...body, stream: true }, options)) {
    const choice = chunk.choices[0];
    if (!choice) continue;
    const { content, images = [] } = choice.delta;
    if (choice.settings) yield { settings: choice.settings };
    if (content) yield { text: afterImage ? content.trimStart() : content };
    if (content) afterImage = false;
    for (const image of images) {
      afterImage = true;
      yield { image: image.image_url.url };
    }
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
}

/**
 * Stream generated images and their previews.
 * @param {string} path of a route of images
 * @param {object | FormData} body with stream=true
 * @param {object} [options] as of `request`
 * @yields {{ index: number, url: string, settings?: object }} previews have no settings
 * @throws {RequestError}
 */
export async function* streamImages(path, body, options) {
  for await (const { index, b64_json, settings } of streamChunks(path, body, options)) {
    yield { index, url: `data:image/png;base64,${b64_json}`, settings };
  }
}

/** The JSON objects of a stream of server-sent events; throws RequestError, also where the stream breaks off. */
async function* streamChunks(path, body, options) {
  const response = await request(path, body, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new RequestError("the connection to the server was lost");
      });
      if (done) throw new RequestError("the server ended the answer before it was complete");
      const events = (buffer + value).split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const line = event.split("\n").find((eventLine) => eventLine.startsWith("data: "));
        if (!line) continue;
        const data = line.slice("data: ".length);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw toRequestError(chunk);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Resolves after so many seconds, or rejects with AbortError when the signal aborts. */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY_ITEM);
  if (key) headers.authorization = `Bearer ${key}`;
  const isJson = body && !(body instanceof FormData);
  if (isJson) headers["content-type"] = "application/json";
  const data = isJson ? JSON.stringify(body) : body;
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: data, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("the server cannot be reached");
  }
}

/** The error of a response's body, or of an event of a stream, which has no status. */
function toRequestError(body, status) {
  const error = body?.error;
  return new RequestError(error?.message ?? `the server answered with ${status}`, { status, param: error?.param });
}
