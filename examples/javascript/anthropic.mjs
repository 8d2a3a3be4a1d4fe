// Asks with Anthropic's own library: one URL and one key are all that changes.
import Anthropic from "@anthropic-ai/sdk";

import { fail, options } from "./options.mjs";

const { address, token, prompt, model, maxTokens, deadlineMs, cancelAfter } = options();

// A refusal is shown at once here; by default the library tries twice more, after the mesh's own delay.
const client = new Anthropic({ baseURL: `http://${address}`, apiKey: token, maxRetries: 0 });

let chunks = 0;
try {
  const stream = client.messages.stream(
    { model, messages: [{ role: "user", content: prompt }], max_tokens: maxTokens, temperature: 0 },
    { headers: { "x-interlock-deadline": String(deadlineMs / 1000) } },
  );
  for await (const event of stream) {
    if (event.type !== "content_block_delta") continue;
    process.stdout.write(event.delta.text);
    if (++chunks === cancelAfter) stream.abort();
  }
  process.stdout.write("\n");
} catch (error) {
  if (!(error instanceof Anthropic.APIError)) throw error;
  fail(error.constructor.name, error.error?.error?.type, error.message);
}
