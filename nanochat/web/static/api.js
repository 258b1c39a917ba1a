// The server's API: one streamed answer at a time, as OpenAI's clients read it.

export class ApiError extends Error {}

async function* serverSentEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // a character may be cut by a chunk's end: stream
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    held += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const events = held.split(/\r?\n\r?\n/);
    held = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
    if (done) return;
  }
}

const headers = (key) => ({ "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) });

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered with ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the number has to do */ }
  if (response.status === 401) message += ": the settings have a field for the key";
  const wait = response.headers.get("retry-after");
  throw new ApiError(wait ? `${message} (in ${wait} s)` : message);
}

export async function models(key) {
  return (await (await checked(await fetch("/v1/models", { headers: headers(key) }))).json()).data;
}

// Yields {text, event, tokens, usage, reason} as they come.
export async function* answer(request, key, signal) {
  const body = JSON.stringify({
    ...request, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 8, truncation: "auto",
  });
  const response = await checked(
    await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body, signal }),
  );
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    const choice = chunk.choices[0];
    yield {
      text: choice?.delta.content ?? "",
      event: choice?.event,
      tokens: choice?.logprobs?.content ?? [],
      usage: chunk.usage,
      reason: choice?.finish_reason,
    };
  }
  throw new ApiError("the answer broke off");
}
