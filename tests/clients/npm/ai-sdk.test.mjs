// The AI SDK, through its providers for OpenAI's APIs, for servers like them, and for Anthropic's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { MODEL, QUESTION, TOKENS, TOO_LONG, URL } from "./suite.mjs";

const openai = createOpenAI({ baseURL: URL, apiKey: "none" });
const like = createOpenAICompatible({ name: "wisp", baseURL: URL, supportsStructuredOutputs: true, includeUsage: true });
const models = {
  "chats": openai.chat(MODEL),
  "responses": openai.responses(MODEL),
  "servers like OpenAI's": like(MODEL),
  "messages": createAnthropic({ baseURL: URL, apiKey: "none" })(MODEL),
};
const Weather = z.object({ sky: z.enum(["clear", "cloudy"]), rain: z.boolean() });
const short = { prompt: QUESTION, maxOutputTokens: 20, temperature: 0, maxRetries: 0 };

for (const [name, model] of Object.entries(models)) {
  test(`${name}: a stream has the text and the usage of the whole answer`, async () => {
    const whole = await generateText({ ...short, model });
    const stream = streamText({ ...short, model });
    let told = "";
    for await (const text of stream.textStream) told += text;
    assert.ok(told);
    assert.equal(told, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  });

  test(`${name}: a tool is called and its result goes back`, async () => {
    const seen = [];
    const forecast = tool({
      inputSchema: z.object({ city: z.enum(["Rome", "Oslo"]) }),
      execute: async ({ city }) => {
        seen.push(city);
        return "clear";
      },
    });
    const steps = { tools: { forecast }, toolChoice: "required", stopWhen: stepCountIs(2) };
    await generateText({ ...short, ...steps, model, maxOutputTokens: TOKENS });
    assert.ok(["Rome", "Oslo"].includes(seen[0]));
  });

  test(`${name}: an object of a schema`, async () => {
    const { object } = await generateObject({ ...short, model, schema: Weather, maxOutputTokens: TOKENS });
    Weather.parse(object);
  });

  test(`${name}: a prompt that is too long`, async () => {
    await assert.rejects(generateText({ ...short, model, prompt: TOO_LONG }), { statusCode: 400 });
  });
}
