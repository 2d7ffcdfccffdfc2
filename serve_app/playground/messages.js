import { textOf } from "./answer.js";

/**
 * The messages of a request for an answer to the last turn. Turns without an answer are left out: the model would see
 * two prompts in a row.
 */
export function messages(turns) {
  const before = turns.slice(0, -1).filter((turn) => textOf(turn.answer) || turn.answer.calls.length);
  return [...before.flatMap((turn) => [...asked(turn), ...answered(turn)]), ...asked(turns.at(-1))];
}

function asked({ prompt }) {
  return prompt ? [{ role: "user", content: prompt }] : [];
}

/** The messages of an answer and of the results of its tool calls. */
function answered({ answer: given }) {
  const content = textOf(given);
  if (!given.calls.length) return [{ role: "assistant", content }];
  const calls = given.calls.map(({ id, name, arguments: text }) => {
    return { id, type: "function", function: { name, arguments: text } };
  });
  const results = given.calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result }));
  return [{ role: "assistant", content: content || null, tool_calls: calls }, ...results];
}
