// The state in the browser's storage. Missing or wrong parts, for example of other releases, become defaults.

const KEY = "serve_app.playground";

export const DEFAULTS = {
  model: "",
  system: "",
  tools: "",
  temperature: "",
  top_p: "",
  top_k: "",
  seed: "",
  max_tokens: "512",
  stop: "",
  presence_penalty: "",
  frequency_penalty: "",
  repetition_penalty: "",
  odds: false,
};

/** The stored state, and whether it could not be read. */
export function load() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return { state: state(object(found)), damaged: !isObject(found) };
  } catch (error) {
    return { state: state({}), damaged: error instanceof SyntaxError };
  }
}

/** Store the state; returns whether that worked. Without room for all of it, probabilities are left out. */
export function save(state) {
  for (const text of [() => JSON.stringify(state), () => JSON.stringify(state, withoutOdds)]) {
    try {
      localStorage.setItem(KEY, text());
      return true;
    } catch {
      // the storage is full or switched off
    }
  }
  return false;
}

function withoutOdds(key, value) {
  return key === "odds" && Array.isArray(value) ? [] : value;
}

function state({ chat, compare }) {
  const { settings: chosen, turns } = object(chat);
  const { prompt, sides } = object(compare);
  return {
    chat: { settings: settings(chosen), turns: list(turns, turn) },
    compare: { prompt: text(prompt), sides: [side(list(sides)[0]), side(list(sides)[1])] },
  };
}

function side(found) {
  const { settings: chosen, answer: given } = object(found);
  return { settings: settings(chosen), answer: isObject(given) ? answer(given) : null };
}

function settings(found) {
  const given = object(found);
  const whole = Object.entries(DEFAULTS).map(([name, usual]) => {
    return [name, typeof given[name] === typeof usual ? given[name] : usual];
  });
  return Object.fromEntries(whole);
}

/** A turn without a prompt answers the results of the tool calls before it. */
function turn({ prompt, answer: given }) {
  return { prompt: text(prompt), answer: answer(object(given)) };
}

/** One answer: its model, its text as tokens, its times in ms since the request, and its finish reason. */
export function answer(found = {}) {
  const { title, message, advice } = object(found.failure);
  return {
    model: text(found.model),
    reasoning: text(found.reasoning),
    tokens: list(found.tokens, token),
    calls: list(found.calls, call).filter(({ id, name }) => id && name),
    count: number(found.count) ?? 0,
    promptTokens: number(found.promptTokens),
    firstMs: number(found.firstMs),
    lastMs: number(found.lastMs),
    end: text(found.end),
    failure: title ? { title: text(title), message: text(message), advice: text(advice) } : null,
  };
}

function token({ text: written, odds }) {
  return { text: text(written), odds: list(odds, chosen) };
}

function call(found) {
  const parts = { id: text(found.id), name: text(found.name), arguments: text(found.arguments) };
  return { index: number(found.index) ?? 0, ...parts, result: text(found.result) };
}

function chosen(found) {
  return { ...likely(found), top: list(found.top, likely) };
}

function likely({ token, logprob }) {
  return { token: text(token), logprob: number(logprob) ?? -9999 };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function object(value) {
  return isObject(value) ? value : {};
}

function list(value, each = object) {
  return Array.isArray(value) ? value.filter(isObject).map(each) : [];
}

function text(value) {
  return typeof value === "string" ? value : "";
}

function number(value) {
  return Number.isFinite(value) ? value : null;
}
