// Anthropic's client for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { ASK, checkArguments, MODEL, PARAMETERS, ROOT, TOKENS, TOO_LONG } from "./suite.mjs";

const client = new Anthropic({ baseURL: ROOT, apiKey: "none", maxRetries: 0 });

test("a stream ends with the message that it told", async () => {
  const options = { model: MODEL, messages: ASK, max_tokens: 20, temperature: 0 };
  const whole = await client.messages.create(options);
  let told = "";
  const stream = client.messages.stream(options).on("text", (text) => (told += text));
  const final = await stream.finalMessage();
  assert.ok(told);
  assert.equal(told, final.content[0].text);
  assert.equal(told, whole.content[0].text);
  assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
});

test("a tool is called, whole and streamed", async () => {
  const tools = [{ name: "forecast", input_schema: PARAMETERS }];
  const choice = { type: "any", disable_parallel_tool_use: true };
  const options = { model: MODEL, messages: ASK, tools, tool_choice: choice, max_tokens: TOKENS, temperature: 0 };
  const whole = await client.messages.create(options);
  assert.equal(whole.stop_reason, "tool_use");
  checkArguments(whole.content[0].input);
  const final = await client.messages.stream(options).finalMessage();
  assert.deepEqual(final.content[0].input, whole.content[0].input);
});

test("a prompt that is too long", async () => {
  const long = { model: MODEL, messages: [{ role: "user", content: TOO_LONG }], max_tokens: 5 };
  await assert.rejects(client.messages.create(long), { status: 400 });
});
