// What the checks of all clients share: the suite's address, and what they ask.
import assert from "node:assert/strict";

export const URL = process.env.WISP_CLIENTS_URL; // with /v1
export const ROOT = URL.slice(0, -"/v1".length);
export const MODEL = process.env.WISP_CLIENTS_MODEL;
export const QUESTION = "How is the weather in Rome?";
export const ASK = [{ role: "user", content: QUESTION }];
export const TOO_LONG = "far ".repeat(Number(process.env.WISP_CLIENTS_CONTEXT));
export const TOKENS = 200;
// The texts of an answer in a form are short, since the model goes on with free texts for ever.
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] }, days: { type: "integer", enum: [1, 2] } },
  required: ["city", "days"],
  additionalProperties: false,
};

export function checkArguments(given) {
  const read = typeof given === "string" ? JSON.parse(given) : given;
  assert.deepEqual(Object.keys(read).sort(), ["city", "days"]);
  assert.ok(["Rome", "Oslo"].includes(read.city));
  assert.ok([1, 2].includes(read.days));
}

export async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}
