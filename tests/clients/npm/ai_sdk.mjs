// The AI SDK with its providers for OpenAI (responses and chats) and for services like OpenAI's.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run } from "./common.mjs";

const Town = z.object({ name: z.string().max(20), people: z.number().int().min(1).max(9999) });
const weather = tool({
  description: "The weather now.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async ({ city }) => `sunny, 25 degrees in ${city}`,
});
const options = { temperature: 0, maxOutputTokens: 60, maxRetries: 0 };

function models(url, name = MODEL) {
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
  const compatible = createOpenAICompatible({
    name: "serve_app", baseURL: `${url}/v1`, supportsStructuredOutputs: true, includeUsage: true,
  });
  return { responses: openai(name), chats: openai.chat(name), compatible: compatible(name) };
}

async function each(url, check, name = MODEL) {
  const results = {};
  for (const [kind, model] of Object.entries(models(url, name))) results[kind] = await check(model);
  return results;
}

async function quickstart(url) {
  return each(url, async (model) => {
    const { text } = await generateText({ ...options, model, prompt: FRANCE });
    assert.match(text, /Paris/);
    return text;
  });
}

async function conversation(url) {
  return each(url, async (model) => {
    const first = await generateText({ ...options, model, prompt: FRANCE });
    const messages = [
      { role: "user", content: FRANCE }, ...first.response.messages, { role: "user", content: "And of Spain?" },
    ];
    return (await generateText({ ...options, model, messages })).text;
  });
}

async function stream(url) {
  return each(url, async (model) => {
    const parts = [];
    const answer = streamText({ ...options, model, prompt: FRANCE });
    for await (const part of answer.textStream) parts.push(part);
    assert.equal(parts.join(""), await answer.text);
    assert.ok((await answer.usage).outputTokens > 0);
    return parts.length;
  });
}

// The first step has to call the tool; the second one sees its result.
async function tool_loop(url) {
  return each(url, async (model) => {
    const { steps } = await generateText({
      ...options, maxOutputTokens: 200, model, prompt: WEATHER, tools: { weather }, stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    assert.equal(steps.length, 2);
    assert.match(steps[0].toolResults[0].output, /^sunny/);
    return steps[1].text;
  });
}

// With and without a tool.
async function typed_output(url) {
  return each(url, async (model) => {
    const given = { ...options, maxOutputTokens: 100, model, prompt: TOWN, output: Output.object({ schema: Town }) };
    const towns = [(await generateText(given)).output];
    towns.push((await generateText({ ...given, tools: { weather }, toolChoice: "none" })).output);
    return towns.map((town) => Town.parse(town).name);
  });
}

async function errors(url) {
  const status = (model, prompt) =>
    generateText({ ...options, model, prompt }).then(
      () => assert.fail("no error"),
      (error) => (APICallError.isInstance(error) ? error.statusCode : assert.fail(String(error))),
    );
  const overflow = await each(url, (model) => status(model, OVERFLOW));
  const unknown = await each(url, (model) => status(model, FRANCE), "gpt-unknown");
  assert.deepEqual(Object.values(overflow), [400, 400, 400]);
  assert.deepEqual(Object.values(unknown), [404, 404, 404]);
  return [overflow, unknown];
}

await run({ quickstart, conversation, stream, tool_loop, typed_output, errors });
