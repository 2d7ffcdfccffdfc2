// Anthropic's client.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run } from "./common.mjs";

const CITY = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const TOOLS = [{ name: "weather", description: "The weather now.", input_schema: CITY }];
const user = (content) => ({ role: "user", content });
const client = (url) => new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const options = { model: MODEL, max_tokens: 60, temperature: 0 };
const text = (message) => message.content.map((block) => block.text ?? "").join("");

async function quickstart(url) {
  const message = await client(url).messages.create({ ...options, messages: [user(FRANCE)] });
  assert.match(text(message), /Paris/);
  return text(message);
}

async function conversation(url) {
  const first = await client(url).messages.create({ ...options, messages: [user(FRANCE)] });
  const messages = [user(FRANCE), { role: "assistant", content: first.content }, user("And of Spain?")];
  return text(await client(url).messages.create({ ...options, messages }));
}

async function stream(url) {
  const parts = [];
  const answer = client(url).messages.stream({ ...options, messages: [user(FRANCE)] });
  answer.on("text", (part) => parts.push(part));
  const text = await answer.finalText();
  assert.equal(parts.join(""), text);
  return parts.length;
}

async function tool_loop(url) {
  const messages = [user(WEATHER)];
  const given = { ...options, tools: TOOLS };
  const tool_choice = { type: "tool", name: "weather", disable_parallel_tool_use: true };
  const first = await client(url).messages.create({ ...given, messages, tool_choice });
  assert.equal(first.stop_reason, "tool_use");
  const use = first.content.find((block) => block.type === "tool_use");
  assert.deepEqual(Object.keys(use.input), ["city"]);
  const result = { type: "tool_result", tool_use_id: use.id, content: "sunny, 25 degrees" };
  messages.push({ role: "assistant", content: first.content }, user([result]));
  return text(await client(url).messages.create({ ...given, messages, tool_choice: { type: "none" } }));
}

async function typed_output(url) {
  const format = { type: "json_schema", schema: CITY };
  const message = await client(url).messages.create({ ...options, messages: [user(TOWN)], output_config: { format } });
  assert.deepEqual(Object.keys(JSON.parse(text(message))), ["city"]);
  return text(message);
}

async function errors(url) {
  const ask = (model, question) => client(url).messages.create({ ...options, model, messages: [user(question)] });
  await assert.rejects(ask(MODEL, OVERFLOW), (error) =>
    error instanceof Anthropic.BadRequestError && /prompt is too long/.test(error.message));
  await assert.rejects(ask("claude", FRANCE), (error) => error instanceof Anthropic.NotFoundError);
  return 2;
}

await run({ quickstart, conversation, stream, tool_loop, typed_output, errors });
