// OpenAI's client for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ASK, checkArguments, collect, MODEL, PARAMETERS, QUESTION, TOKENS, TOO_LONG, URL } from "./suite.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const Weather = z.object({ sky: z.enum(["clear", "cloudy"]), rain: z.boolean() });
const tools = [{ type: "function", function: { name: "forecast", parameters: PARAMETERS } }];

test("a stream has the text and the usage of the whole answer", async () => {
  const options = { model: MODEL, messages: ASK, seed: 1, max_tokens: 20 };
  const whole = await client.chat.completions.create(options);
  const streamed = { ...options, stream: true, stream_options: { include_usage: true } };
  const chunks = await collect(await client.chat.completions.create(streamed));
  const told = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.ok(told);
  assert.equal(told, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

test("a required tool is called, whole and streamed", async () => {
  const options = { model: MODEL, messages: ASK, tools, tool_choice: "required", seed: 2, max_tokens: TOKENS };
  const whole = await client.chat.completions.create({ ...options, parallel_tool_calls: false });
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const [call] = whole.choices[0].message.tool_calls;
  checkArguments(call.function.arguments);
  const stream = client.chat.completions.stream({ ...options, parallel_tool_calls: false });
  const [streamed] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert.equal(streamed.function.arguments, call.function.arguments);
});

test("answers are parsed into a type", async () => {
  const form = zodResponseFormat(Weather, "weather");
  const options = { model: MODEL, messages: ASK, response_format: form, max_tokens: TOKENS };
  const answer = await client.chat.completions.parse(options);
  Weather.parse(answer.choices[0].message.parsed);
});

test("log-probabilities come with each token", async () => {
  const options = { model: MODEL, messages: ASK, max_tokens: 4, logprobs: true, top_logprobs: 2 };
  const answer = await client.chat.completions.create(options);
  assert.equal(answer.choices[0].logprobs.content.length, answer.usage.completion_tokens);
  assert.ok(answer.choices[0].logprobs.content.every((one) => one.top_logprobs.length === 2));
});

test("responses: whole, streamed after an earlier one, and parsed", async () => {
  const first = await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 20 });
  assert.ok(first.output_text);
  const next = { model: MODEL, input: "And?", previous_response_id: first.id, max_output_tokens: 20, stream: true };
  const events = await collect(await client.responses.create(next));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  const done = events.at(-1).response;
  const text = done.output.flatMap((item) => item.content.map((part) => part.text)).join("");
  assert.equal(deltas.map((event) => event.delta).join(""), text);
  const format = zodTextFormat(Weather, "weather");
  const form = { model: MODEL, input: QUESTION, text: { format }, max_output_tokens: TOKENS };
  Weather.parse((await client.responses.parse(form)).output_parsed);
});

test("a prompt that is too long, and a model that is not there", async () => {
  const long = { model: MODEL, messages: [{ role: "user", content: TOO_LONG }] };
  await assert.rejects(client.chat.completions.create(long), { status: 400, code: "context_length_exceeded" });
  await assert.rejects(client.chat.completions.create({ model: "other", messages: ASK }), { code: "model_not_found" });
});
