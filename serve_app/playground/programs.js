// Programs that send a chat completion and print the answer as it arrives. `base` is the address of the API.

import { javascriptLiteral, pythonLiteral } from "./literals.js";

/** Fields of this service that OpenAI's Python client does not have as parameters. */
const EXTRA = ["top_k", "repetition_penalty"];

export function curl(base, body) {
  const json = JSON.stringify(body, null, 2);
  return `curl --no-buffer ${quoted(`${base}/chat/completions`)} \\
  --header 'Content-Type: application/json' \\
  --data-raw ${quoted(json)}
`;
}

export function python(base, body) {
  const named = Object.entries(body).filter(([name]) => !EXTRA.includes(name));
  const extra = Object.entries(body).filter(([name]) => EXTRA.includes(name));
  const parameters = extra.length ? [...named, ["extra_body", Object.fromEntries(extra)]] : named;
  const lines = parameters.map(([name, value]) => `    ${name}=${pythonLiteral(value, 1)},\n`);
  const calls = body.tools ? "    if delta.tool_calls:\n        print(delta.tool_calls)\n" : "";
  return `from openai import OpenAI

client = OpenAI(base_url=${pythonLiteral(base)}, api_key="none")
stream = client.chat.completions.create(
${lines.join("")})
for chunk in stream:
    delta = chunk.choices[0].delta
    print(delta.content or "", end="", flush=True)
${calls}`;
}

export function javascript(base, body) {
  const calls = body.tools ? "  if (delta.tool_calls) console.log(JSON.stringify(delta.tool_calls));\n" : "";
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${javascriptLiteral(base)}, apiKey: "none" });
const stream = await client.chat.completions.create(${javascriptLiteral(body)});
for await (const chunk of stream) {
  const { delta } = chunk.choices[0];
  process.stdout.write(delta.content ?? "");
${calls}}
`;
}

/** One word of a POSIX shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
