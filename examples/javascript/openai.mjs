// Asks with OpenAI's own library: one URL and one key are all that changes.
import OpenAI from "openai";

import { fail, options } from "./options.mjs";

const { address, token, prompt, model, maxTokens, deadlineMs, cancelAfter } = options();

// A refusal is shown at once here; by default the library tries twice more, after the mesh's own delay.
const client = new OpenAI({ baseURL: `http://${address}/v1`, apiKey: token, maxRetries: 0 });

let chunks = 0;
try {
  const stream = await client.chat.completions.create(
    {
      model,
      messages: [{ role: "user", content: prompt }],
      max_completion_tokens: maxTokens,
      temperature: 0,
      stream: true,
    },
    { headers: { "x-interlock-deadline": String(deadlineMs / 1000) } },
  );
  for await (const chunk of stream) {
    const text = chunk.choices[0]?.delta.content;
    if (!text) continue;
    process.stdout.write(text);
    if (++chunks === cancelAfter) stream.controller.abort();
  }
  process.stdout.write("\n");
  // The library ends the loop quietly where it was the caller who went away.
  if (stream.controller.signal.aborted) throw new OpenAI.APIUserAbortError();
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  fail(error.constructor.name, error.code ?? error.type, error.message);
}
