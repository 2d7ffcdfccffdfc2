import { Failure } from "./failure.js";
import { askForKey, keyHeader } from "./key.js";
import { events } from "./stream.js";

const BASE = new URL("..", import.meta.url); // the service may have a route prefix

async function call(path, options) {
  try {
    const headers = { ...options?.headers, ...keyHeader() };
    const response = await fetch(new URL(path, BASE), { ...options, headers });
    if (response.status === 401) askForKey();
    return response;
  } catch (error) {
    throw options?.signal?.aborted ? error : new Failure("unreachable");
  }
}

/**
 * All models and adapters, with the states of the models: ready, loading, asleep or failed. The `parent` of a model is
 * null, that of an adapter is its model.
 */
export async function models() {
  const [list, ready] = await Promise.all([call("v1/models"), call("ready")]);
  if (!list.ok) throw await Failure.response(list);
  const states = ready.ok || ready.status === 503 ? await ready.json().catch(() => ({})) : {};
  const known = new Map(states.models?.map((model) => [model.name, model]));
  return (await list.json()).data.map(({ id, parent = null }) => {
    return { id, parent, state: "loading", detail: "", ...known.get(parent ?? id) };
  });
}

/**
 * Parts of one answer: {waiting}, {text, odds, reasoning, calls}, {end}, {usage}. Throws Failure. An abort also stops
 * the model.
 */
export async function* complete(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await Failure.response(response);
  try {
    for await (const { comment, data } of events(response.body)) {
      if (data === "[DONE]") return;
      if (comment === undefined) yield* parts(JSON.parse(data));
      else yield { waiting: comment };
    }
  } catch (error) {
    throw signal.aborted || error instanceof Failure ? error : new Failure("broken");
  }
  throw new Failure("broken"); // the stream ended without [DONE]
}

function* parts({ error, choices, usage }) {
  if (error) throw Failure.envelope(error);
  for (const { delta, logprobs, finish_reason } of choices) {
    const part = piece(delta, logprobs);
    if (delta.role === undefined || part.text || part.reasoning || part.calls.length) yield part;
    if (finish_reason) yield { end: finish_reason };
  }
  if (usage) yield { usage };
}

/** What a token adds to an answer. Services use two names for reasoning. */
function piece({ content, reasoning_content, reasoning, tool_calls }, logprobs) {
  return {
    text: content ?? "",
    odds: (logprobs?.content ?? []).map(odds),
    reasoning: reasoning_content ?? reasoning ?? "",
    calls: tool_calls ?? [],
  };
}

/** A token, its log probability, and the most likely tokens at its position. */
function odds({ token, logprob, top_logprobs }) {
  return { token, logprob, top: top_logprobs.map((other) => ({ token: other.token, logprob: other.logprob })) };
}
