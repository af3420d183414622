// Talking to the server: the key, errors in one shape, and server-sent events from a POST or a GET.

const KEY = "headrace.key";
// An error within a stream has no status: the one that its type has elsewhere. A stream only breaks off for want of an engine.
const STREAM_STATUS = { invalid_request_error: 400, rate_limit_error: 429, server_error: 503 };

export class ServerError extends Error {
  // status 0: no answer at all. retryAfter in seconds, or null.
  constructor(status, message, { param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export function setKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    setKey.kept = key;  // storage is off: it lasts as long as the page
  }
}

function headers() {
  let key = setKey.kept ?? null;
  try {
    key = sessionStorage.getItem(KEY) ?? key;
  } catch { /* storage is off */ }
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function answer(path, { body, signal } = {}) {
  const options = { headers: headers(), signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch { /* a proxy's page, or nothing */ }
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ServerError(response.status, told?.message ?? `The server answered ${response.status}.`, {
    param: told?.param ?? null,
    retryAfter: Number.isFinite(after) ? after : null,
  });
}

export async function get(path) {
  return (await answer(path)).json();
}

// Yields the data of each event, parsed. Returns at "[DONE]" or at the end; throws ServerError where it breaks off.
export async function* events(path, { body, signal } = {}) {
  const response = await answer(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await read(reader);
      if (done) {
        if (body !== undefined) throw new ServerError(0, "The connection was lost.");
        return;
      }
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (!data.length) continue;
        signal?.throwIfAborted();  // what had come already is not shown any more
        if (data[0] === "[DONE]") return;
        const event = JSON.parse(data.join("\n"));
        if (event.error) throw new ServerError(STREAM_STATUS[event.error.type] ?? 500, event.error.message ?? "The server failed.");
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection was lost.");
  }
}
