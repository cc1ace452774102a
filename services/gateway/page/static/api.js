// Requests to the gateway: the key in memory, server-sent events, and errors in the API's own words.

let key = "";

export function setKey(text) {
  key = text.trim();
}

export function hasKey() {
  return key !== "";
}

/** An error to show: the status and the API's code and message, or what happened to the connection. */
export class Problem extends Error {
  constructor(message, { status = 0, code = "", requestId = "", retryAfter = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  /** The error in one paragraph. */
  get text() {
    const head = [this.status || "", this.code].filter(Boolean).join(" ");
    const wait = this.retryAfter ? ` Try again in ${this.retryAfter} s.` : "";
    const id = this.requestId ? ` (request ${this.requestId})` : "";
    const end = /[.!?]$/.test(this.message) ? "" : ".";
    return `${head ? `${head}: ` : ""}${this.message}${end}${wait}${id}`;
  }
}

function problemOf(error, response) {
  return new Problem(error.message || "the answer is not one of the API", {
    status: response.status >= 400 ? response.status : 0,
    code: error.code || error.type || "",
    requestId: response.headers.get("x-request-id") || "",
    retryAfter: response.headers.get("retry-after") || "",
  });
}

/** Send a request; throw a Problem unless its status is good. */
export async function request(path, { body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key) sent.authorization = `Bearer ${key}`;
  if (body !== undefined) sent["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The gateway does not answer. Is it still running?", { code: "no_connection" });
  }
  if (response.ok) return response;
  let found = {};
  try {
    found = (await response.json()).error || {};
  } catch {
    // Not the API's error body, such as a proxy's page.
  }
  throw problemOf(found, response);
}

/** The data of server-sent events: parsed JSON, without the closing [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const data = rest
          .slice(0, end)
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""))
          .join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw error;
    throw new Problem("The connection ended within the answer.", { code: "connection_lost" });
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Stream a chat completion: call `onChunk` with each chunk. Throws a Problem for an error, also within the stream. */
export async function complete(body, headers, signal, onChunk) {
  const response = await request("/v1/chat/completions", { body, headers, signal });
  let ended = false;
  for await (const chunk of events(response)) {
    if (chunk.error) throw problemOf(chunk.error, response);
    ended ||= (chunk.choices || []).some((choice) => choice.finish_reason);
    onChunk(chunk);
  }
  if (!ended) throw new Problem("The connection ended before the answer did.", { code: "connection_lost" });
  return response;
}
