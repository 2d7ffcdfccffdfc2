// OpenAI's client: chats and responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run } from "./common.mjs";

const CITY = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const TOOLS = [{ type: "function", function: { name: "weather", description: "The weather now.", parameters: CITY } }];
const Town = z.object({ name: z.string().max(20), people: z.number().int().min(1).max(9999) });
const user = (content) => ({ role: "user", content });
const client = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const options = { model: MODEL, temperature: 0, max_tokens: 60 };

async function quickstart(url) {
  const chat = await client(url).chat.completions.create({ ...options, messages: [user(FRANCE)] });
  const response = await client(url).responses.create({ model: MODEL, input: FRANCE, max_output_tokens: 60, temperature: 0 });
  assert.match(chat.choices[0].message.content, /Paris/);
  assert.match(response.output_text, /Paris/);
  return [chat.choices[0].message.content, response.output_text];
}

async function conversation(url) {
  const first = await client(url).chat.completions.stream({ ...options, messages: [user(FRANCE)] }).finalMessage();
  const messages = [user(FRANCE), first, user("And of Spain?")];
  const second = await client(url).chat.completions.create({ ...options, messages });
  return second.choices[0].message.content;
}

async function stream(url) {
  const chat = client(url).chat.completions.stream({ ...options, messages: [user(FRANCE)] });
  const texts = [];
  for await (const chunk of chat) texts.push(chunk.choices[0]?.delta?.content ?? "");
  assert.equal(texts.join(""), (await chat.finalMessage()).content);
  return texts.length;
}

async function tool_loop(url) {
  const given = { ...options, tools: TOOLS, parallel_tool_calls: false };
  const messages = [user(WEATHER)];
  const first = await client(url).chat.completions.create({ ...given, messages, tool_choice: "required" });
  const message = first.choices[0].message;
  const [call] = message.tool_calls;
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  messages.push(message, { role: "tool", tool_call_id: call.id, content: "sunny, 25 degrees" });
  const second = await client(url).chat.completions.create({ ...given, messages, tool_choice: "none" });
  return second.choices[0].message.content;
}

async function typed_output(url) {
  const given = { ...options, max_tokens: 100, messages: [user(TOWN)] };
  const answer = await client(url).chat.completions.parse({ ...given, response_format: zodResponseFormat(Town, "town") });
  return Town.parse(answer.choices[0].message.parsed).name;
}

async function errors(url) {
  const ask = (model, text) => client(url).chat.completions.create({ ...options, model, messages: [user(text)] });
  await assert.rejects(ask(MODEL, OVERFLOW), (error) =>
    error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded");
  await assert.rejects(ask("gpt-unknown", FRANCE), (error) =>
    error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  return 2;
}

await run({ quickstart, conversation, stream, tool_loop, typed_output, errors });
