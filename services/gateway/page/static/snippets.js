// A request as a curl command and as Python.

function shell(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function python(value, indent = "    ") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map((one) => python(one, indent)).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function curl(origin, body, headers, keyed) {
  const lines = [`curl -N ${origin}/v1/chat/completions`, "-H 'content-type: application/json'"];
  if (keyed) lines.push('-H "authorization: Bearer $WISP_API_KEY"');
  for (const [name, value] of Object.entries(headers)) lines.push(`-H ${shell(`${name}: ${value}`)}`);
  lines.push(`-d ${shell(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

export function pythonCode(origin, body, headers, keyed) {
  const { wisp, top_k: topK, stream, ...own } = body;
  const extra = {};
  if (wisp) extra.wisp = wisp;
  if (topK !== undefined) extra.top_k = topK;
  const lines = keyed ? ["import os", ""] : [];
  lines.push("from openai import OpenAI", "");
  const key = keyed ? 'os.environ["WISP_API_KEY"]' : '"none"';
  lines.push(`client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})`);
  lines.push("stream = client.chat.completions.create(");
  for (const [name, value] of Object.entries(own)) lines.push(`    ${name}=${python(value)},`);
  lines.push("    stream=True,");
  if (Object.keys(headers).length) lines.push(`    extra_headers=${python(headers)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  lines.push(")", "for chunk in stream:", "    for choice in chunk.choices:");
  lines.push('        print(choice.delta.content or "", end="", flush=True)');
  return lines.join("\n");
}
