// The JavaScript client against the server with known answers; the last line says what was asked for.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(`${process.argv[2]}/`);
const { default: OpenAI, BadRequestError } = require("openai");
const client = new OpenAI({ baseURL: process.argv[3], apiKey: "-", maxRetries: 0 });
const model = "scripted", answer = "The answer is 42.", messages = [{ role: "user", content: "hi" }];

const chat = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 1 });
assert.equal(chat.choices[0].message.content, answer);
assert.equal(chat.choices[0].finish_reason, "stop");
assert.equal(chat.choices[0].logprobs.content.length, answer.length);

let text = "", usage;
for await (const chunk of await client.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer);
assert.equal(usage.completion_tokens, chat.usage.completion_tokens);
assert.equal(await client.chat.completions.stream({ model, messages }).finalContent(), answer);

const left = await client.chat.completions.create({ model, messages, stream: true });
for await (const chunk of left) break;  // which aborts it
assert.ok(left.controller.signal.aborted);

const completion = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 40 });
assert.deepEqual(completion.choices.map((choice) => choice.text), [answer, answer]);

assert.equal((await client.responses.create({ model, input: "hi" })).output_text, answer);
text = "";
for await (const event of await client.responses.create({ model, input: "hi", stream: true }))
  if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, answer);

const embeddings = await client.embeddings.create({ model, input: ["ab", "b"] });  // asks for base64 by itself
assert.equal(embeddings.data.length, 2);
assert.equal(embeddings.data[0].embedding.length, 3);
assert.ok(Math.abs(Math.hypot(...embeddings.data[0].embedding) - 1) < 1e-6);

assert.deepEqual((await client.models.list()).data.map((entry) => entry.id), [model]);
await assert.rejects(
  client.chat.completions.create({ model, messages, temperature: -1 }),
  (error) => error instanceof BadRequestError && error.param === "temperature" && Boolean(error.requestID),
);
console.log("chat, completions and responses, streamed and whole, leaving a stream, embeddings, models, errors");
