// The command line that all examples share: where the mesh is, who asks, and what.
import { parseArgs } from "node:util";

const usage =
  "usage: node EXAMPLE.mjs HOST:PORT TOKEN PROMPT [--max-tokens N] [--deadline SECONDS] [--cancel-after CHUNKS] [--model NAME]";

export function options() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      "max-tokens": { type: "string", default: "50" },
      deadline: { type: "string", default: "240" },
      "cancel-after": { type: "string" },
      model: { type: "string", default: "smollm2-135m-instruct" },
    },
  });
  if (positionals.length !== 3) {
    console.error(usage);
    process.exit(2);
  }
  const [address, token, prompt] = positionals;
  return {
    address,
    token,
    prompt,
    model: values.model,
    maxTokens: Number(values["max-tokens"]),
    deadlineMs: 1000 * Number(values.deadline),
    cancelAfter: values["cancel-after"] === undefined ? Infinity : Number(values["cancel-after"]),
  };
}

// How every example ends when it has no whole answer: the status by its name, and the reason for programs.
export function fail(code, reason, message) {
  console.error(`\n${code} ${reason ?? "-"}: ${message}`);
  process.exitCode = 1;
}
