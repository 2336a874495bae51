// The server's API: the page's facts, the models, and answers as they are generated.

const KEY = "api-key"; // kept for this tab only
const LOST = "The connection was lost before the answer was complete.";

/** What went wrong, in words for a person. `status` is the HTTP status (0: there was none), `param` the part of the request at fault. */
export class Failure extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export const facts = async () => (await request("page/page.json")).json();
export const file = async (name) => (await request(`page/${name}`)).blob();

/** The models of this server: [{id, max_model_len, ...}]. */
export const models = async () => (await (await request("v1/models")).json()).data;

/**
 * The events of a streamed answer, as OpenAI's API has them.
 * @param {object} body the request without `stream`
 * @param {AbortSignal} signal ends it
 */
export async function* answer(body, signal) {
  const sent = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const response = await request("v1/chat/completions", { method: "POST", body: sent, signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(event.error.message, response.status, event.error.param);
    yield event;
  }
  throw new Failure(LOST);
}

async function request(path, options = {}) {
  const headers = {};
  if (options.body) headers["Content-Type"] = "application/json";
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().then((body) => body.error ?? {}, () => ({}));
  const message = told.message ?? `The server answered with the status ${response.status}, and does not say why.`;
  throw new Failure(message, response.status, told.param);
}

/** The data of server-sent events. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Failure(LOST);
    }
    if (part.done) return;
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
